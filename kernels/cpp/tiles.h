// What every pass shares: the state as ctypes hands it over, how phi is read, exp, and the sums of one tile.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <tuple>
#ifdef __SSE__
#include <xmmintrin.h>
#endif

namespace {

constexpr int64_t TILE = 1024;
constexpr int BINS = 2048;              // of the rank histogram
constexpr float BINS_PER_NEPER = 64.0f;  // bins for a factor e of probability
constexpr int MAX_REJECTIONS = 64;
constexpr float BETA_1 = 0.9f, BETA_2 = 0.999f, EPSILON = 1e-8f;
constexpr float INFINITE = std::numeric_limits<float>::infinity();

}  // namespace

extern "C" {

// Mirrored field by field in kernels/cpp/ops.py.
struct State {
  const void* logits;     // (rows, vocab), row_stride elements apart
  const float *g1, *g2;   // (rows, vocab) gradients that describe phi, or null
  const float *phi, *m, *v;  // (rows, vocab) once phi is written out, or null
  const float *tau, *top_p, *eta;  // (rows,)
  const int64_t* top_k;
  const uint8_t* greedy;
  double *maximum, *s_1, *t_1, *s_tau, *t_tau;  // tiles, (rows, tiles)
  double *row_maximum, *row_s_1, *row_s_tau, *mass;  // rows, (rows,); mass (rows, tiles)
  int64_t* argmax;
  int64_t rows, vocab, tiles, row_stride;
  int32_t dtype;  // of the logits
  int32_t threads;
};
}

namespace {

// Where an update writes; outputs may alias g1, g2, phi, m, v of the state, element for element.
struct Plan {
  float *gradient, *phi, *m, *v;
  int64_t t;  // the update's number, from 1 on
};

// Denormal weights cost a hundred cycles each and mean nothing here.
struct FlushDenormals {
#ifdef __SSE__
  const unsigned saved = _mm_getcsr();
  FlushDenormals() { _mm_setcsr(saved | 0x8040u); }
  ~FlushDenormals() { _mm_setcsr(saved); }
#endif
};

template <class To, class From>
inline To bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// exp(x) for x <= 88, to about one unit in the last place; 0 below the smallest normal number.
// Cephes' polynomial on [-ln 2 / 2, ln 2 / 2]; rounding to an integer by adding 1.5 * 2^23.
inline float exponential(float x) {
  constexpr float magic = 12582912.0f;
  const float clamped = x < -87.33f ? -87.33f : x;
  const float shifted = clamped * 1.44269504088896341f + magic;
  const float n = shifted - magic;
  float r = clamped - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const float scale = bits<float>((bits<int32_t>(shifted) << 23) + 0x3f800000);
  return x < -87.33f ? 0.0f : p * scale;
}

// A 16-bit float as it lies in memory: arithmetic widens it, and what is stored is rounded to the nearest (ties to even).
struct bfloat16 {
  uint16_t word;
  void operator=(float x) {  // not a constructor: loops that make a temporary are not vectorised
    const uint32_t u = bits<uint32_t>(x);
    word = uint16_t(x == x ? (u + 0x7fffu + ((u >> 16) & 1u)) >> 16 : (u >> 16) | 0x40u);
  }
  operator float() const { return bits<float>(uint32_t(word) << 16); }
};

enum Dtype : int32_t { FLOAT32 = 0, BFLOAT16 = 1 };  // as kernels/cpp/build.py numbers them

// use(x) with x of the type in which tensors of a pass are stored.
template <class Use>
inline void typed(int64_t dtype, Use use) {
  dtype == BFLOAT16 ? use(bfloat16()) : use(0.0f);
}

template <class T>
inline void convert(const T* from, int64_t count, float* to) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) to[i] = from[i];
}

// Adam's weights of g_1 .. g_t, oldest first, in the moments after t updates (kernels/adam.py).
struct Weights {
  float m[3], v[3];
};

Weights adam_weights(int t, bool corrected) {
  Weights w{};
  for (int i = 0; i < t; ++i)
    for (const double beta : {0.9, 0.999}) {
      const double raw = (1 - beta) * std::pow(beta, t - 1 - i);
      (beta == 0.9 ? w.m : w.v)[i] = float(corrected ? raw / (1 - std::pow(beta, t)) : raw);
    }
  return w;
}

const Weights SECOND = adam_weights(2, true), THIRD = adam_weights(3, true), THIRD_RAW = adam_weights(3, false);

inline float direction_1(float g) { return g / (std::fabs(g) + EPSILON); }

inline float direction_2(float g1, float g2, const Weights& w) {
  return (w.m[0] * g1 + w.m[1] * g2) / (std::sqrt(w.v[0] * g1 * g1 + w.v[1] * g2 * g2) + EPSILON);
}

inline int64_t tile_width(const State& s, int64_t tile) { return std::min(TILE, s.vocab - tile * TILE); }

// phi of columns start .. start + width of a row; `buffer` (TILE) is used unless they lie in memory as they are.
const float* load(const State& s, int64_t row, int64_t start, int64_t width, float* buffer) {
  const int64_t at = row * s.vocab + start;
  if (s.phi) return s.phi + at;
  const int64_t from = row * s.row_stride + start;
  if (s.dtype == FLOAT32) {
    const float* x = static_cast<const float*>(s.logits) + from;
    if (!s.g1) return x;
    std::copy(x, x + width, buffer);
  } else {
    convert(static_cast<const bfloat16*>(s.logits) + from, width, buffer);
  }
  if (!s.g1) return buffer;
  const float* g1 = s.g1 + at;
  const float eta = s.eta[row];
  if (!s.g2) {
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) buffer[i] += eta * direction_1(g1[i]);
    return buffer;
  }
  const float* g2 = s.g2 + at;
  const Weights w = SECOND;
#pragma omp simd
  for (int64_t i = 0; i < width; ++i)
    buffer[i] = (buffer[i] + eta * direction_1(g1[i])) + eta * direction_2(g1[i], g2[i], w);
  return buffer;
}

float value_at(const State& s, int64_t row, int64_t column) {
  float buffer[1];
  return *load(s, row, column, 1, buffer);
}

template <class T>
void tile_weights(const float* phi, int64_t width, float maximum, float inverse_tau, T* out) {
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) out[i] = exponential((phi[i] - maximum) * inverse_tau);
}

// sum exp(d / tau) and sum d / tau exp(d / tau) with d = phi - maximum; -inf counts as nothing.
std::pair<float, float> exponential_sums(const float* phi, int64_t width, float maximum, float inverse_tau) {
  float s = 0, t = 0;
#pragma omp simd reduction(+ : s, t)
  for (int64_t i = 0; i < width; ++i) {
    const float z = (phi[i] - maximum) * inverse_tau;
    const float w = exponential(z);
    s += w;
    t += w * (z < -1e30f ? -1e30f : z);
  }
  return {s, t};
}

void tile_sums(const State& s, int64_t row, int64_t tile, const float* phi) {
  const int64_t width = tile_width(s, tile), at = row * s.tiles + tile;
  float maximum = -INFINITE;
#pragma omp simd reduction(max : maximum)
  for (int64_t i = 0; i < width; ++i) maximum = phi[i] > maximum ? phi[i] : maximum;
  s.maximum[at] = maximum;
  if (maximum == -INFINITE) {
    bool broken = false;  // nothing but -inf is a tile without mass; a NaN among it must not pass for that
    for (int64_t i = 0; i < width; ++i) broken |= phi[i] != phi[i];
    s.s_1[at] = s.t_1[at] = s.s_tau[at] = s.t_tau[at] = broken ? NAN : 0.0;
    return;
  }
  const auto one = exponential_sums(phi, width, maximum, 1.0f);
  const auto own = s.tau[row] == 1.0f ? one : exponential_sums(phi, width, maximum, 1.0f / s.tau[row]);
  std::tie(s.s_1[at], s.t_1[at]) = one;
  std::tie(s.s_tau[at], s.t_tau[at]) = own;
}

}  // namespace
