// The passes of kernels/tiled.py, fused, for a CPU: one read of phi per operation, tile by tile, in float32 with
// float64 sums across tiles. Plain loops over tiles of at most 1024 floats that the compiler vectorises; no torch
// headers. Called through ctypes by kernels/cpp/ops.py, which checks shapes and owns every pointer.
//
// phi after t updates (kernels/adam.py): the logits plus eta times Adam's direction of g1 (and of g1, g2), or `phi`.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>
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
  int32_t dtype;  // of the logits: 0 float32, 1 bfloat16, 2 float16
  int32_t threads;
};

// Where an update writes; outputs may alias g1, g2, phi, m, v of the state, element for element.
struct Plan {
  float *gradient, *phi, *m, *v;
  double m_correction, v_correction;  // 1 - beta^t
  float m_weight[3], v_weight[3];      // bias-corrected closed form, oldest gradient first
  float m_raw[3], v_raw[3];            // without correction
  int32_t t;
};
}

namespace {

// Denormal weights cost a hundred cycles each and mean nothing here.
class FlushDenormals {
#ifdef __SSE__
  unsigned saved_ = _mm_getcsr();

 public:
  FlushDenormals() { _mm_setcsr(saved_ | 0x8040u); }
  ~FlushDenormals() { _mm_setcsr(saved_); }
#else
 public:
  FlushDenormals() {}
  ~FlushDenormals() {}
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

inline float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000u) << 16;
  const uint32_t magnitude = h & 0x7fffu;
  // Shifting the exponent by 2^112 in float arithmetic also normalises half denormals.
  const float scaled = bits<float>(magnitude << 13) * bits<float>(uint32_t(0x77800000u));
  const uint32_t finite = bits<uint32_t>(scaled) | sign;
  const uint32_t special = sign | 0x7f800000u | (magnitude << 13);  // infinity, or NaN with its payload
  return bits<float>(magnitude >= 0x7c00u ? special : finite);
}

inline float direction_1(float g) { return g / (std::fabs(g) + EPSILON); }

inline float direction_2(float g1, float g2, const float* mw, const float* vw) {
  return (mw[0] * g1 + mw[1] * g2) / (std::sqrt(vw[0] * g1 * g1 + vw[1] * g2 * g2) + EPSILON);
}

struct Coefficients {
  float m[2], v[2];
};

Coefficients second_step() {
  const double b1 = 0.9, b2 = 0.999;
  return {{float((1 - b1) * b1 / (1 - b1 * b1)), float((1 - b1) / (1 - b1 * b1))},
          {float((1 - b2) * b2 / (1 - b2 * b2)), float((1 - b2) / (1 - b2 * b2))}};
}

inline int64_t tile_width(const State& s, int64_t tile) { return std::min(TILE, s.vocab - tile * TILE); }

// phi of columns start .. start + width of a row; `buffer` (TILE) is used unless they lie in memory as they are.
const float* load(const State& s, int64_t row, int64_t start, int64_t width, float* buffer) {
  const int64_t at = row * s.vocab + start;
  if (s.phi) return s.phi + at;
  const int64_t from = row * s.row_stride + start;
  if (s.dtype == 0) {
    const float* x = static_cast<const float*>(s.logits) + from;
    if (!s.g1) return x;
    std::copy(x, x + width, buffer);
  } else {
    const uint16_t* x = static_cast<const uint16_t*>(s.logits) + from;
    if (s.dtype == 1) {
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) buffer[i] = bits<float>(uint32_t(x[i]) << 16);
    } else {
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) buffer[i] = half_to_float(x[i]);
    }
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
  const Coefficients c = second_step();
#pragma omp simd
  for (int64_t i = 0; i < width; ++i)
    buffer[i] = (buffer[i] + eta * direction_1(g1[i])) + eta * direction_2(g1[i], g2[i], c.m, c.v);
  return buffer;
}

float value_at(const State& s, int64_t row, int64_t column) {
  float buffer[1];
  return *load(s, row, column, 1, buffer);
}

void tile_weights(const float* phi, int64_t width, float maximum, float inverse_tau, float* out) {
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) out[i] = exponential((phi[i] - maximum) * inverse_tau);
}

struct Sums {
  float s, t;
};

// sum exp(d / tau) and sum d / tau exp(d / tau) with d = phi - maximum; -inf counts as nothing.
Sums exponential_sums(const float* phi, int64_t width, float maximum, float inverse_tau) {
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
  const Sums one = exponential_sums(phi, width, maximum, 1.0f);
  const Sums own = s.tau[row] == 1.0f ? one : exponential_sums(phi, width, maximum, 1.0f / s.tau[row]);
  s.s_1[at] = one.s;
  s.t_1[at] = one.t;
  s.s_tau[at] = own.s;
  s.t_tau[at] = own.t;
}

// -- random numbers: kernels/random.py ------------------------------------------------------------------------------

double uniform(const int64_t* key, uint32_t round) {
  uint32_t c0 = uint32_t(key[1]), c1 = uint32_t(uint64_t(key[1]) >> 32), c2 = uint32_t(key[2]);
  uint32_t c3 = uint32_t(key[3]) | round, k0 = uint32_t(key[0]), k1 = uint32_t(uint64_t(key[0]) >> 32);
  for (int i = 0; i < 10; ++i) {
    const uint64_t p0 = uint64_t(c0) * 0xD2511F53u, p1 = uint64_t(c2) * 0xCD9E8D57u;
    const uint32_t n0 = uint32_t(p1 >> 32) ^ c1 ^ k0, n2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
    c0 = n0, c1 = uint32_t(p1), c2 = n2, c3 = uint32_t(p0);
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  return double((uint64_t(c0) << 21) | (c1 >> 11)) * 0x1.0p-53;
}

// -- one row's filters and draw -------------------------------------------------------------------------------------

struct Cut {
  float value;
  int64_t id;
  bool keeps(float phi, int64_t column) const { return phi > value || (phi == value && column <= id); }
};

class Row {
 public:
  Row(const State& state, int64_t row)
      : s(state), row(row), maximum(float(state.row_maximum[row])), inverse_tau(1.0f / state.tau[row]),
        total(state.row_s_tau[row]), top_k(state.top_k[row]),
        limit(state.top_p[row] >= 1 ? std::numeric_limits<double>::infinity() : double(state.top_p[row]) * total) {}

  // One kept token needs no draw: the second is cut when the first alone exceeds top_p.
  bool certain() const { return s.greedy[row] || top_k == 1 || 1.0 > limit; }

  // The first id whose cumulative unfiltered mass exceeds u times the total.
  int64_t invert(double u) {
    const double* mass = s.mass + row * s.tiles;
    const double target = u * total;
    double before = 0;
    int64_t tile = -1;
    for (int64_t j = 0; j < s.tiles; ++j) {
      if (mass[j] > 0) {
        tile = j;
        if (before + mass[j] > target) break;
      }
      if (j + 1 < s.tiles) before += mass[j];
    }
    if (tile < 0) return s.argmax[row];
    before = 0;
    for (int64_t j = 0; j < tile; ++j) before += mass[j];
    const int64_t width = tile_width(s, tile);
    tile_weights(load(s, row, tile * TILE, width, phi_), width, maximum, inverse_tau, weights_);
    int64_t last = 0;
    for (int64_t i = 0; i < width; ++i) {
      before += weights_[i];
      if (weights_[i] > 0) last = i;
      if (before > target && weights_[i] > 0) return tile * TILE + i;
    }
    return tile * TILE + last;
  }

  // Whether the filters keep an id: the mass and the count of what ranks above it are small enough.
  bool keeps(int64_t id) {
    const float value = value_at(s, row, id);
    double mass = 0;
    int64_t count = 0;
    for (int64_t tile = 0; tile < s.tiles; ++tile) {
      if (!(s.maximum[row * s.tiles + tile] >= value)) continue;
      const int64_t start = tile * TILE, width = tile_width(s, tile);
      const float* phi = load(s, row, start, width, phi_);
      tile_weights(phi, width, maximum, inverse_tau, weights_);
      const int64_t lower = std::min(std::max<int64_t>(id - start, 0), width);  // equal values rank above here
      float sum = 0;
      int32_t n = 0;
#pragma omp simd reduction(+ : sum, n)
      for (int64_t i = 0; i < lower; ++i) {
        sum += phi[i] >= value ? weights_[i] : 0.0f;
        n += phi[i] >= value;
      }
#pragma omp simd reduction(+ : sum, n)
      for (int64_t i = lower; i < width; ++i) {
        sum += phi[i] > value ? weights_[i] : 0.0f;
        n += phi[i] > value;
      }
      mass += sum;
      count += n;
      if (count >= top_k || (mass > limit && count > 0)) return false;
    }
    return true;
  }

  // The lowest kept rank. A histogram over (maximum - phi) / tau, monotone in rank, gives the mass and the count
  // before each bin; only the bin in which the kept prefix ends is sorted.
  Cut last_kept() {
    std::vector<double> mass(BINS, 0.0);
    std::vector<int64_t> count(BINS, 0);
    auto bin = [this](float phi) {
      const float z = (maximum - phi) * inverse_tau * BINS_PER_NEPER;
      return z < float(BINS - 1) ? std::max(int(z), 0) : BINS - 1;
    };
    each_tile([&](const float* phi, const float* weights, int64_t, int64_t width) {
      for (int64_t i = 0; i < width; ++i) {
        const int b = bin(phi[i]);
        mass[b] += weights[i];
        ++count[b];
      }
    });
    double mass_before = 0, mass_at_cut = 0;
    int64_t count_before = 0, count_at_cut = 0;
    int cut = 0;
    for (int b = 0; b < BINS; ++b) {
      if (!count[b]) continue;
      if (count_before > 0 && (mass_before > limit || count_before >= top_k)) break;
      cut = b, mass_at_cut = mass_before, count_at_cut = count_before;
      mass_before += mass[b];
      count_before += count[b];
    }
    std::vector<std::pair<float, int64_t>> candidates;
    candidates.reserve(size_t(count[cut]));
    each_tile([&](const float* phi, const float*, int64_t start, int64_t width) {
      for (int64_t i = 0; i < width; ++i)
        if (bin(phi[i]) == cut) candidates.emplace_back(phi[i] == phi[i] ? phi[i] : -INFINITE, start + i);
    });
    std::sort(candidates.begin(), candidates.end(), [](const auto& a, const auto& b) {
      return a.first > b.first || (a.first == b.first && a.second < b.second);
    });
    Cut last{candidates.front().first, candidates.front().second};
    for (const auto& [value, id] : candidates) {
      if (count_at_cut > 0 && (mass_at_cut > limit || count_at_cut >= top_k)) break;
      last = {value, id};
      mass_at_cut += exponential((value - maximum) * inverse_tau);
      ++count_at_cut;
    }
    return last;
  }

  // Inverse CDF over the kept ids in ascending order.
  int64_t invert_kept(const Cut& cut, double u) {
    double kept = 0;
    each_tile([&](const float* phi, const float* weights, int64_t start, int64_t width) {
      for (int64_t i = 0; i < width; ++i) kept += cut.keeps(phi[i], start + i) ? weights[i] : 0.0f;
    });
    const double target = u * kept;
    double before = 0;
    int64_t chosen = -1, last = s.argmax[row];
    each_tile([&](const float* phi, const float* weights, int64_t start, int64_t width) {
      for (int64_t i = 0; i < width && chosen < 0; ++i) {
        if (!cut.keeps(phi[i], start + i) || weights[i] == 0.0f) continue;
        before += weights[i];
        last = start + i;
        if (before > target) chosen = last;
      }
    });
    return chosen < 0 ? last : chosen;
  }

  int64_t draw(const int64_t* key) {
    if (certain()) return s.argmax[row];
    const int64_t first = invert(uniform(key, 0));
    if (keeps(first)) return first;
    const Cut cut = last_kept();
    for (uint32_t round = 1; round < MAX_REJECTIONS; ++round) {
      const int64_t x = invert(uniform(key, round));
      if (cut.keeps(value_at(s, row, x), x)) return x;
    }
    return invert_kept(cut, uniform(key, MAX_REJECTIONS));
  }

  // Minus the entropy, the token's probability, and the top-two margin of the filtered distribution.
  void filtered_stats(int64_t token, float* neg_entropy, float* probability, float* margin) {
    const Cut cut = last_kept();
    double kept = 0, weighted = 0;
    float second = -INFINITE;
    int64_t count = 0;
    const int64_t top = s.argmax[row];
    each_tile([&](const float* phi, const float* weights, int64_t start, int64_t width) {
      for (int64_t i = 0; i < width; ++i) {
        if (!cut.keeps(phi[i], start + i)) continue;
        kept += weights[i];
        if (weights[i] > 0) weighted += weights[i] * ((phi[i] - maximum) * inverse_tau);
        if (start + i != top) second = std::max(second, phi[i]);
        ++count;
      }
    });
    auto share = [&](float phi) { return exponential((phi - maximum) * inverse_tau) / kept; };
    const float value = value_at(s, row, token);
    *neg_entropy = float(weighted / kept - std::log(kept));
    *probability = cut.keeps(value, token) ? float(share(value)) : 0.0f;
    *margin = float(1.0 / kept - (count > 1 ? share(second) : 0.0));
  }

 private:
  // Calls f(phi, weights, first column, width) for every tile, in order.
  template <class F>
  void each_tile(F f) {
    for (int64_t tile = 0; tile < s.tiles; ++tile) {
      const int64_t start = tile * TILE, width = tile_width(s, tile);
      const float* phi = load(s, row, start, width, phi_);
      tile_weights(phi, width, maximum, inverse_tau, weights_);
      f(phi, weights_, start, width);
    }
  }

  const State& s;
  const int64_t row;
  const float maximum, inverse_tau;
  const double total;
  const int64_t top_k;
  const double limit;
  alignas(64) float phi_[TILE];
  alignas(64) float weights_[TILE];
};

// One Adam step on one tile: `slope` is g @ E.T there. Leaves the new phi in `phi_new`.
void adam_tile(const State& s, const Plan& plan, int64_t row, int64_t start, int64_t width, const float* slope,
               float offset, float* phi_new, float* scratch) {
  const float maximum = float(s.row_maximum[row]), inverse_tau = 1.0f / s.tau[row], eta = s.eta[row];
  const float scale = float(1.0 / (double(s.tau[row]) * s.row_s_tau[row]));
  const int64_t at = row * s.vocab + start;
  const float* phi = load(s, row, start, width, phi_new);
  float* g = scratch;
#pragma omp simd
  for (int64_t i = 0; i < width; ++i)
    g[i] = exponential((phi[i] - maximum) * inverse_tau) * (slope[i] - offset) * scale;

  const float *g1 = s.g1 ? s.g1 + at : nullptr, *g2 = s.g2 ? s.g2 + at : nullptr;
  const float *mw = plan.m_weight, *vw = plan.v_weight;
  if (s.m) {  // the moments are written out; in place where the plan says so
    const float *m = s.m + at, *v = s.v + at;
    float *m_out = plan.m ? plan.m + at : nullptr, *v_out = plan.v ? plan.v + at : nullptr;
    const float m_scale = float(1.0 / plan.m_correction), v_scale = float(1.0 / plan.v_correction);
    for (int64_t i = 0; i < width; ++i) {
      const float m_new = BETA_1 * m[i] + (1 - BETA_1) * g[i], v_new = BETA_2 * v[i] + (1 - BETA_2) * g[i] * g[i];
      phi_new[i] = phi[i] + eta * (m_new * m_scale / (std::sqrt(v_new * v_scale) + EPSILON));
      if (m_out) m_out[i] = m_new, v_out[i] = v_new;
    }
  } else if (!g1) {
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) phi_new[i] = phi[i] + eta * direction_1(g[i]);
  } else if (!g2) {
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) phi_new[i] = phi[i] + eta * direction_2(g1[i], g[i], mw, vw);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) {
      const float m_hat = mw[0] * g1[i] + mw[1] * g2[i] + mw[2] * g[i];
      const float v_hat = vw[0] * g1[i] * g1[i] + vw[1] * g2[i] * g2[i] + vw[2] * g[i] * g[i];
      phi_new[i] = phi[i] + eta * (m_hat / (std::sqrt(v_hat) + EPSILON));
    }
  }
  if (!s.m && plan.m) {  // the first update past the kept gradients: from now on Adam's own moments
    float *m = plan.m + at, *v = plan.v + at;
    for (int64_t i = 0; i < width; ++i) {
      const float a = g1[i], b = g2[i], c = g[i];
      m[i] = plan.m_raw[0] * a + plan.m_raw[1] * b + plan.m_raw[2] * c;
      v[i] = plan.v_raw[0] * a * a + plan.v_raw[1] * b * b + plan.v_raw[2] * c * c;
    }
  }
  if (plan.gradient) std::copy(g, g + width, plan.gradient + at);
  if (plan.phi) std::copy(phi_new, phi_new + width, plan.phi + at);
}

}  // namespace

// -- what ctypes calls ------------------------------------------------------------------------------------------------

extern "C" {

// Tile sums of phi for all rows.
void row_sums(const State* state) {
  const State& s = *state;
#pragma omp parallel num_threads(s.threads)
  {
    FlushDenormals flush;
    alignas(64) float buffer[TILE];
#pragma omp for collapse(2) schedule(static)
    for (int64_t row = 0; row < s.rows; ++row)
      for (int64_t tile = 0; tile < s.tiles; ++tile)
        tile_sums(s, row, tile, load(s, row, tile * TILE, tile_width(s, tile), buffer));
  }
}

// Row sums, statistics and argmax from the tiles; out (4, rows): lse_1, lse_tau, entropy_1, entropy_tau.
void combine(const State* state, float* out) {
  const State& s = *state;
#pragma omp parallel for num_threads(s.threads) schedule(static)
  for (int64_t row = 0; row < s.rows; ++row) {
    const int64_t at = row * s.tiles;
    int64_t best = 0;
    for (int64_t j = 1; j < s.tiles; ++j)
      if (s.maximum[at + j] > s.maximum[at + best]) best = j;
    const double maximum = s.maximum[at + best], tau = s.tau[row];
    double s_1 = 0, t_1 = 0, s_tau = 0, t_tau = 0;
    for (int64_t j = 0; j < s.tiles; ++j) {
      const double delta = s.maximum[at + j] == -INFINITE ? 0.0 : s.maximum[at + j] - maximum;
      const double one = std::exp(delta), own = std::exp(delta / tau);
      s_1 += one * s.s_1[at + j];
      t_1 += one * (s.t_1[at + j] + delta * s.s_1[at + j]);
      s.mass[at + j] = own * s.s_tau[at + j];
      s_tau += s.mass[at + j];
      t_tau += own * (s.t_tau[at + j] + delta / tau * s.s_tau[at + j]);
    }
    s.row_maximum[row] = maximum;
    s.row_s_1[row] = s_1;
    s.row_s_tau[row] = s_tau;
    out[row] = float(maximum + std::log(s_1));
    out[s.rows + row] = float(maximum / tau + std::log(s_tau));
    out[2 * s.rows + row] = float(std::log(s_1) - t_1 / s_1);
    out[3 * s.rows + row] = float(std::log(s_tau) - t_tau / s_tau);
    alignas(64) float buffer[TILE];
    const float* phi = load(s, row, best * TILE, tile_width(s, best), buffer);
    int64_t place = 0;
    for (int64_t i = 1; i < tile_width(s, best); ++i)
      if (phi[i] > phi[place]) place = i;
    s.argmax[row] = best * TILE + place;
  }
}

// exp((phi - maximum) / tau) of columns start .. start + columns, into out (rows, columns).
void weights(const State* state, int64_t start, int64_t columns, float* out) {
  const State& s = *state;
  const int64_t tiles = (columns + TILE - 1) / TILE;
#pragma omp parallel num_threads(s.threads)
  {
    FlushDenormals flush;
    alignas(64) float buffer[TILE];
#pragma omp for collapse(2) schedule(static)
    for (int64_t row = 0; row < s.rows; ++row)
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t width = std::min(TILE, columns - tile * TILE);
        tile_weights(load(s, row, start + tile * TILE, width, buffer), width, float(s.row_maximum[row]),
                     1.0f / s.tau[row], out + row * columns + tile * TILE);
      }
  }
}

// One Adam step on columns start .. start + columns of `count` rows (of `index`, or all): slope (count, columns),
// offset (count,).
void step(const State* state, const Plan* plan, const float* slope, const float* offset, int64_t start,
          int64_t columns, const int64_t* index, int64_t count) {
  const State& s = *state;
  const int64_t tiles = (columns + TILE - 1) / TILE;
#pragma omp parallel num_threads(s.threads)
  {
    FlushDenormals flush;
    alignas(64) float phi[TILE];
    alignas(64) float scratch[TILE];
#pragma omp for collapse(2) schedule(static)
    for (int64_t i = 0; i < count; ++i)
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t row = index ? index[i] : i, width = std::min(TILE, columns - tile * TILE);
        adam_tile(s, *plan, row, start + tile * TILE, width, slope + i * columns + tile * TILE, offset[i], phi, scratch);
        tile_sums(s, row, start / TILE + tile, phi);
      }
  }
}

// One token for each of `count` rows; keys (count, 4).
void draw(const State* state, const int64_t* keys, const int64_t* index, int64_t count, int64_t* tokens) {
#pragma omp parallel num_threads(state->threads)
  {
    FlushDenormals flush;
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < count; ++i) tokens[i] = Row(*state, index ? index[i] : i).draw(keys + 4 * i);
  }
}

// Statistics of the filtered distribution; out (3, count).
void filtered_stats(const State* state, const int64_t* tokens, const int64_t* index, int64_t count, float* out) {
#pragma omp parallel num_threads(state->threads)
  {
    FlushDenormals flush;
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < count; ++i)
      Row(*state, index ? index[i] : i).filtered_stats(tokens[i], out + i, out + count + i, out + 2 * count + i);
  }
}

// exp of n floats at most 88, for tests of its accuracy.
void exponentials(const float* x, int64_t n, float* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = exponential(x[i]);
}

// Uniforms of n keys (n, 4) at a round, for tests against kernels/random.py.
void uniforms(const int64_t* keys, int64_t n, int32_t round, double* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = uniform(keys + 4 * i, uint32_t(round));
}
}
