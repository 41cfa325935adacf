// The passes of kernels/tiled.py, fused, for a CPU: one read of phi per operation, tile by tile, in float32 with
// float64 sums across tiles. Plain loops over tiles of at most 1024 floats that the compiler vectorises; no torch
// headers. Called through ctypes by kernels/cpp/ops.py, which checks shapes and owns every pointer.
//
// phi after t updates (kernels/adam.py): the logits plus eta times Adam's direction of g1 (and of g1, g2), or `phi`.

#include "attention.h"
#include "blocks.h"
#include "draw.h"

namespace {

// One Adam step on one tile: `slope` is g @ E.T there. Leaves the new phi in `phi_new`.
template <class T>
void adam_tile(const State& s, const Plan& plan, int64_t row, int64_t start, int64_t width, const T* slope,
               float offset, float* phi_new, float* scratch) {
  const float maximum = float(s.row_maximum[row]), inverse_tau = 1.0f / s.tau[row], eta = s.eta[row];
  const float scale = float(1.0 / (double(s.tau[row]) * s.row_s_tau[row]));
  const int64_t at = row * s.vocab + start;
  const float* phi = load(s, row, start, width, phi_new);
  float* g = scratch;
#pragma omp simd
  for (int64_t i = 0; i < width; ++i)
    g[i] = exponential((phi[i] - maximum) * inverse_tau) * (float(slope[i]) - offset) * scale;

  const float *g1 = s.g1 ? s.g1 + at : nullptr, *g2 = s.g2 ? s.g2 + at : nullptr;
  if (s.m) {  // the moments are written out; in place where the plan says so
    const float *m = s.m + at, *v = s.v + at;
    float *m_out = plan.m ? plan.m + at : nullptr, *v_out = plan.v ? plan.v + at : nullptr;
    const float m_scale = float(1.0 / (1 - std::pow(0.9, plan.t)));
    const float v_scale = float(1.0 / (1 - std::pow(0.999, plan.t)));
    for (int64_t i = 0; i < width; ++i) {
      const float m_new = BETA_1 * m[i] + (1 - BETA_1) * g[i], v_new = BETA_2 * v[i] + (1 - BETA_2) * g[i] * g[i];
      phi_new[i] = phi[i] + eta * (m_new * m_scale / (std::sqrt(v_new * v_scale) + EPSILON));
      if (m_out) m_out[i] = m_new, v_out[i] = v_new;
    }
  } else if (!g1) {
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) phi_new[i] = phi[i] + eta * direction_1(g[i]);
  } else if (!g2) {
    const Weights w = SECOND;
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) phi_new[i] = phi[i] + eta * direction_2(g1[i], g[i], w);
  } else {
    const Weights w = THIRD;
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) {
      const float m_hat = w.m[0] * g1[i] + w.m[1] * g2[i] + w.m[2] * g[i];
      const float v_hat = w.v[0] * g1[i] * g1[i] + w.v[1] * g2[i] * g2[i] + w.v[2] * g[i] * g[i];
      phi_new[i] = phi[i] + eta * (m_hat / (std::sqrt(v_hat) + EPSILON));
    }
  }
  if (!s.m && plan.m) {  // the first update past the kept gradients: from now on Adam's own moments
    const Weights w = THIRD_RAW;
    float *m = plan.m + at, *v = plan.v + at;
    for (int64_t i = 0; i < width; ++i) {
      const float a = g1[i], b = g2[i], c = g[i];
      m[i] = w.m[0] * a + w.m[1] * b + w.m[2] * c;
      v[i] = w.v[0] * a * a + w.v[1] * b * b + w.v[2] * c * c;
    }
  }
  if (plan.gradient) std::copy(g, g + width, plan.gradient + at);
  if (plan.phi) std::copy(phi_new, phi_new + width, plan.phi + at);
}

// use(row, first, width) for every tile of `columns` columns of every row.
template <class Use>
void each_tile(const State& s, int64_t columns, Use use) {
  const int64_t tiles = (columns + TILE - 1) / TILE;
#pragma omp parallel num_threads(s.threads)
  {
    FlushDenormals flush;
#pragma omp for collapse(2) schedule(static)
    for (int64_t row = 0; row < s.rows; ++row)
      for (int64_t tile = 0; tile < tiles; ++tile) use(row, tile * TILE, std::min(TILE, columns - tile * TILE));
  }
}

// use(i, row) for each of `count` rows: those of `index`, or the first ones where it is null.
template <class Use>
void each_drawn(const State& s, const int64_t* index, int64_t count, int64_t never, Use use) {
#pragma omp parallel num_threads(s.threads)
  {
    FlushDenormals flush;
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < count; ++i) {
      Row row(s, index ? index[i] : i, never);
      use(i, row);
    }
  }
}

}  // namespace

// -- what ctypes calls ------------------------------------------------------------------------------------------------

extern "C" {

// Tile sums of phi for all rows.
void row_sums(const State* state) {
  const State& s = *state;
  each_tile(s, s.vocab, [&](int64_t row, int64_t first, int64_t width) {
    alignas(64) float buffer[TILE];
    tile_sums(s, row, first / TILE, load(s, row, first, width, buffer));
  });
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
void weights(const State* state, int64_t start, int64_t columns, void* out, int64_t dtype) {
  const State& s = *state;
  typed(dtype, [&](auto zero) {
    each_tile(s, columns, [&](int64_t row, int64_t first, int64_t width) {
      alignas(64) float buffer[TILE];
      tile_weights(load(s, row, start + first, width, buffer), width, float(s.row_maximum[row]), 1.0f / s.tau[row],
                   static_cast<decltype(zero)*>(out) + row * columns + first);
    });
  });
}

// The t-th Adam step on columns start .. start + columns: slope (rows, columns) of `dtype`, offset (rows,). It writes
// those of gradient, phi, m and v that are not null.
void step(const State* state, float* gradient, float* phi, float* m, float* v, int64_t t, const void* slope,
          int64_t dtype, const float* offset, int64_t start, int64_t columns) {
  const State& s = *state;
  const Plan plan{gradient, phi, m, v, t};
  typed(dtype, [&](auto zero) {
    each_tile(s, columns, [&](int64_t row, int64_t first, int64_t width) {
      alignas(64) float phi_new[TILE], scratch[TILE];
      adam_tile(s, plan, row, start + first, width, static_cast<const decltype(zero)*>(slope) + row * columns + first,
                offset[row], phi_new, scratch);
      tile_sums(s, row, (start + first) / TILE, phi_new);
    });
  });
}

// One token for each of `count` rows, none of them `never`; keys (count, 4).
void draw(const State* state, const int64_t* keys, const int64_t* index, int64_t count, int64_t never,
          int64_t* tokens) {
  each_drawn(*state, index, count, never, [=](int64_t i, Row& row) { tokens[i] = row.draw(keys + 4 * i); });
}

// Statistics of the filtered distribution; out (3, count).
void filtered_stats(const State* state, const int64_t* tokens, const int64_t* index, int64_t count, float* out) {
  each_drawn(*state, index, count, -1, [=](int64_t i, Row& row) {
    row.filtered_stats(tokens[i], out + i, out + count + i, out + 2 * count + i);
  });
}
}
