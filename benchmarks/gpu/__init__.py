"""What can be known of the GPU path: counted without a device, and measured with one."""
