// The passes of a decoder block between its matrix products, fused: norm, rotation, SwiGLU; and their gradients with
// respect to the input alone, since weights are frozen. Tensors are float32 or bfloat16 (`dtype`), cosines and sines
// float32, arithmetic float32. Called by kernels/blocks.py.
#pragma once

#include "tiles.h"

namespace {

constexpr int64_t MAX_HEAD = 1024;  // channels; checked by the caller

inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(std::min(-x, 88.0f))); }

template <class T>
inline float inverse_rms(const T* x, int64_t width, float epsilon) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < width; ++i) sum += float(x[i]) * float(x[i]);
  return 1.0f / std::sqrt(sum / float(width) + epsilon);
}

// The gradient of y = x inv w for one row, and `more` (where it is not null): inv (g w - x inv^2 mean(g w x)) + more.
template <class G, class T>
inline void rms_gradient(const G* g, const T* x, const T* w, float inverse, const T* more, int64_t width, T* out) {
  float dot = 0;
#pragma omp simd reduction(+ : dot)
  for (int64_t i = 0; i < width; ++i) dot += float(g[i]) * float(w[i]) * float(x[i]);
  const float mean = dot * inverse * inverse / float(width);
#pragma omp simd
  for (int64_t i = 0; i < width; ++i)
    out[i] = inverse * (float(g[i]) * float(w[i]) - float(x[i]) * mean) + (more ? float(more[i]) : 0.0f);
}

// One head of `size` channels: normalised and multiplied by w (where w is not null), and rotated by size / 2 cosines and
// sines, channel i with channel i + size / 2.
template <class T>
inline void turn(const T* from, const T* w, float epsilon, const float* c, const float* s, int64_t size, T* to) {
  const int64_t half = size / 2;
  float a[MAX_HEAD];
  convert(from, size, a);
  if (w) {
    const float inv = inverse_rms(from, size, epsilon);
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) a[i] = a[i] * inv * float(w[i]);
  }
  const float* b = a + half;
#pragma omp simd
  for (int64_t i = 0; i < half; ++i) {
    to[i] = a[i] * c[i] - b[i] * s[i];
    to[i + half] = b[i] * c[i] + a[i] * s[i];
  }
}

// Its gradient g, back to `from`.
template <class T>
inline void turn_back(const T* g, const T* from, const T* w, float epsilon, const float* c, const float* s,
                      int64_t size, T* to) {
  const int64_t half = size / 2;
  const T *a = g, *b = g + half;
  float turned[MAX_HEAD];
#pragma omp simd
  for (int64_t i = 0; i < half; ++i) {
    turned[i] = float(a[i]) * c[i] + float(b[i]) * s[i];
    turned[i + half] = float(b[i]) * c[i] - float(a[i]) * s[i];
  }
  if (w)
    rms_gradient(turned, from, w, inverse_rms(from, size, epsilon), static_cast<const T*>(nullptr), size, to);
  else
    std::copy(turned, turned + size, to);
}

// use(row, x) for each row, with x of the tensors' type.
template <class Use>
inline void each_row(int64_t rows, int64_t dtype, int64_t threads, Use use) {
  typed(dtype, [&](auto zero) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; ++row) use(row, zero);
  });
}

template <class T>
inline const T* at(const void* tensor, int64_t place, T) {
  return static_cast<const T*>(tensor) + place;
}

template <class T>
inline T* at(void* tensor, int64_t place, T) {
  return static_cast<T*>(tensor) + place;
}

}  // namespace

extern "C" {

// total = x + added (or x, where added is null; then total is not written) and y = total / sqrt(mean(total^2) + epsilon)
// * w, rows of `width`; the inverse root is kept for the gradient.
void add_rms_norm(const void* x, const void* added, const void* w, void* total, void* y, float* inverse, int64_t rows,
                  int64_t width, float epsilon, int64_t dtype, int64_t threads) {
  each_row(rows, dtype, threads, [=](int64_t row, auto type) {
    const auto *from = at(x, row * width, type), *weight = at(w, 0, type);
    auto* to = at(y, row * width, type);
    if (added) {
      const auto* more = at(added, row * width, type);
      auto* sum = at(total, row * width, type);
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) sum[i] = float(from[i]) + float(more[i]);
      from = sum;
    }
    const float inv = inverse[row] = inverse_rms(from, width, epsilon);
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) to[i] = float(from[i]) * inv * float(weight[i]);
  });
}

// The gradient of y's input, and `more` (where it is not null) added to it.
void rms_norm_gradient(const void* g, const void* x, const void* w, const float* inverse, const void* more, void* out,
                       int64_t rows, int64_t width, int64_t dtype, int64_t threads) {
  each_row(rows, dtype, threads, [=](int64_t row, auto type) {
    const int64_t place = row * width;
    rms_gradient(at(g, place, type), at(x, place, type), at(w, 0, type), inverse[row],
                 more ? at(more, place, type) : nullptr, width, at(out, place, type));
  });
}

// y = silu(gate) * up; gate and up have rows `stride` elements apart.
void swiglu(const void* gates, const void* ups, int64_t stride, void* y, int64_t rows, int64_t width, int64_t dtype,
            int64_t threads) {
  each_row(rows, dtype, threads, [=](int64_t row, auto type) {
    const auto *gate = at(gates, row * stride, type), *up = at(ups, row * stride, type);
    auto* to = at(y, row * width, type);
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) to[i] = float(gate[i]) * sigmoid(gate[i]) * float(up[i]);
  });
}

// The gradient of swiglu, where a row of x holds gate and up, `width` each; out likewise.
void swiglu_gradient(const void* g, const void* x, void* out, int64_t rows, int64_t width, int64_t dtype,
                     int64_t threads) {
  each_row(rows, dtype, threads, [=](int64_t row, auto type) {
    const auto *gates = at(x, 2 * row * width, type), *ups = gates + width, *from = at(g, row * width, type);
    auto *d_gate = at(out, 2 * row * width, type), *d_up = d_gate + width;
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) {
      const float gate = gates[i], slope = from[i], s = sigmoid(gate), silu = gate * s;
      d_up[i] = slope * silu;
      d_gate[i] = slope * float(ups[i]) * (s + silu * (1.0f - s));
    }
  });
}

// A row of x holds `heads` queries, `key_heads` keys and as many values of `size` channels: queries and keys go through
// `turn` with cosines and sines (rows, size / 2), values are copied. q, k and v are packed, (rows, heads, size).
void split_heads(const void* x, const void* q_weight, const void* k_weight, float epsilon, const float* cosines,
                 const float* sines, void* q, void* k, void* v, int64_t rows, int64_t heads, int64_t key_heads,
                 int64_t size, int64_t dtype, int64_t threads) {
  each_row(rows, dtype, threads, [=](int64_t row, auto type) {
    const float *c = cosines + row * size / 2, *s = sines + row * size / 2;
    const auto* from = at(x, row * (heads + 2 * key_heads) * size, type);
    for (int64_t head = 0; head < heads; ++head, from += size)
      turn(from, at(q_weight, 0, type), epsilon, c, s, size, at(q, (row * heads + head) * size, type));
    for (int64_t head = 0; head < key_heads; ++head, from += size)
      turn(from, at(k_weight, 0, type), epsilon, c, s, size, at(k, (row * key_heads + head) * size, type));
    std::copy(from, from + key_heads * size, at(v, row * key_heads * size, type));
  });
}

// The gradient of split_heads, shaped like x.
void split_heads_gradient(const void* g_q, const void* g_k, const void* g_v, const void* x, const void* q_weight,
                          const void* k_weight, float epsilon, const float* cosines, const float* sines, void* out,
                          int64_t rows, int64_t heads, int64_t key_heads, int64_t size, int64_t dtype,
                          int64_t threads) {
  each_row(rows, dtype, threads, [=](int64_t row, auto type) {
    const float *c = cosines + row * size / 2, *s = sines + row * size / 2;
    const int64_t place = row * (heads + 2 * key_heads) * size;
    const auto* from = at(x, place, type);
    auto* to = at(out, place, type);
    for (int64_t head = 0; head < heads; ++head, from += size, to += size)
      turn_back(at(g_q, (row * heads + head) * size, type), from, at(q_weight, 0, type), epsilon, c, s, size, to);
    for (int64_t head = 0; head < key_heads; ++head, from += size, to += size)
      turn_back(at(g_k, (row * key_heads + head) * size, type), from, at(k_weight, 0, type), epsilon, c, s, size, to);
    const auto* values = at(g_v, row * key_heads * size, type);
    std::copy(values, values + key_heads * size, to);
  });
}

}  // extern "C"
