// The passes of a decoder block between its matrix products, fused, float32: norm, rotation, SwiGLU, softmax; and
// their gradients with respect to the input alone (weights are frozen). Called by kernels/blocks.py.
#pragma once

#include "tiles.h"

namespace {

inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(std::min(-x, 88.0f))); }

inline float inverse_rms(const float* x, int64_t width, float epsilon) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < width; ++i) sum += x[i] * x[i];
  return 1.0f / std::sqrt(sum / float(width) + epsilon);
}

// The gradient behind y = x inv w, for one row: inv (g w - x inv^2 mean(g w x)).
inline void rms_gradient(const float* g, const float* x, const float* w, float inverse, int64_t width, float* out) {
  float dot = 0;
#pragma omp simd reduction(+ : dot)
  for (int64_t i = 0; i < width; ++i) dot += g[i] * w[i] * x[i];
  const float mean = dot * inverse * inverse / float(width);
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) out[i] = inverse * (g[i] * w[i] - x[i] * mean);
}

}  // namespace

extern "C" {

// y = x / sqrt(mean(x^2) + epsilon) * w, rows of `width`; the inverse root is kept for the gradient.
void rms_norm(const float* x, const float* w, float* y, float* inverse, int64_t rows, int64_t width, float epsilon,
              int32_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < rows; ++row) {
    const float* from = x + row * width;
    float* to = y + row * width;
    const float inv = inverse[row] = inverse_rms(from, width, epsilon);
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) to[i] = from[i] * inv * w[i];
  }
}

void rms_norm_gradient(const float* g, const float* x, const float* w, const float* inverse, float* out, int64_t rows,
                       int64_t width, int32_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < rows; ++row)
    rms_gradient(g + row * width, x + row * width, w, inverse[row], width, out + row * width);
}

// y = silu(gate) * up; gate and up have rows `stride` floats apart.
void swiglu(const float* gates, const float* ups, int64_t stride, float* y, int64_t rows, int64_t width,
            int32_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < rows; ++row) {
    const float *gate = gates + row * stride, *up = ups + row * stride;
    float* to = y + row * width;
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) to[i] = gate[i] * sigmoid(gate[i]) * up[i];
  }
}

// The gradient behind swiglu, where a row of x holds gate and up, `width` each; out likewise.
void swiglu_gradient(const float* g, const float* x, float* out, int64_t rows, int64_t width, int32_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < rows; ++row) {
    const float *gate = x + 2 * row * width, *up = gate + width, *from = g + row * width;
    float *d_gate = out + 2 * row * width, *d_up = d_gate + width;
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) {
      const float s = sigmoid(gate[i]), silu = gate[i] * s;
      d_up[i] = from[i] * silu;
      d_gate[i] = from[i] * up[i] * (s + silu * (1.0f - s));
    }
  }
}

// Heads of `size` channels, `heads` a token, `stride` floats from token to token in x: each is normalised (where w is
// not null), multiplied by w, and rotated by (rows, size / 2) cosines and sines, channel i with channel i + size / 2.
// y is packed, (rows, heads, size).
void rotate_heads(const float* x, int64_t stride, const float* w, float epsilon, const float* cosines,
                  const float* sines, float* y, int64_t rows, int64_t heads, int64_t size, int32_t threads) {
  const int64_t half = size / 2;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < rows; ++row) {
    const float *c = cosines + row * half, *s = sines + row * half;
    for (int64_t head = 0; head < heads; ++head) {
      const float* a = x + row * stride + head * size;
      const float* b = a + half;
      float *ya = y + (row * heads + head) * size, *yb = ya + half;
      if (w) {
        const float inv = inverse_rms(a, size, epsilon);
        const float *wa = w, *wb = w + half;
#pragma omp simd
        for (int64_t i = 0; i < half; ++i) {
          const float p = a[i] * inv * wa[i], q = b[i] * inv * wb[i];
          ya[i] = p * c[i] - q * s[i];
          yb[i] = q * c[i] + p * s[i];
        }
      } else {
#pragma omp simd
        for (int64_t i = 0; i < half; ++i) {
          ya[i] = a[i] * c[i] - b[i] * s[i];
          yb[i] = b[i] * c[i] + a[i] * s[i];
        }
      }
    }
  }
}

// The gradient behind rotate_heads: g (rows, heads, size) into out, strided like x.
void rotate_heads_gradient(const float* g, const float* x, int64_t stride, const float* w, float epsilon,
                           const float* cosines, const float* sines, float* out, int64_t rows, int64_t heads,
                           int64_t size, int32_t threads) {
  const int64_t half = size / 2;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < rows; ++row) {
    const float *c = cosines + row * half, *s = sines + row * half;
    float turned[1024];  // checked by the caller
    for (int64_t head = 0; head < heads; ++head) {
      const float *ga = g + (row * heads + head) * size, *gb = ga + half;
      const float* from = x + row * stride + head * size;
      float* to = out + row * stride + head * size;
      float* back = w ? turned : to;
#pragma omp simd
      for (int64_t i = 0; i < half; ++i) {
        back[i] = ga[i] * c[i] + gb[i] * s[i];
        back[i + half] = gb[i] * c[i] - ga[i] * s[i];
      }
      if (w) rms_gradient(turned, from, w, inverse_rms(from, size, epsilon), size, to);
    }
  }
}

}  // extern "C"
