// One row's filters and draw: inverse CDF, verification, the last kept rank, and the filtered distribution's statistics.
#pragma once

#include <utility>
#include <vector>

#include "tiles.h"

namespace {

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
  Row(const State& state, int64_t row, int64_t never = -1)
      : s(state), row(row), never(never), maximum(float(state.row_maximum[row])), inverse_tau(1.0f / state.tau[row]),
        total(state.row_s_tau[row]), top_k(state.top_k[row]),
        limit(state.top_p[row] >= 1 ? std::numeric_limits<double>::infinity() : double(state.top_p[row]) * total) {}

  // The lowest id of the largest value beside `never`.
  int64_t best() {
    if (s.argmax[row] != never) return s.argmax[row];
    int64_t best = never == 0;
    float highest = -INFINITE;
    for (int64_t tile = 0; tile < s.tiles; ++tile) {
      if (!(s.maximum[row * s.tiles + tile] > highest)) continue;
      const int64_t start = tile * TILE, width = tile_width(s, tile);
      const float* phi = load(s, row, start, width, phi_);
      for (int64_t i = 0; i < width; ++i)
        if (phi[i] > highest && start + i != never) highest = phi[i], best = start + i;
    }
    return best;
  }

  // One kept token needs no draw: the second is cut when the first alone exceeds top_p.
  bool certain() const { return s.greedy[row] || top_k == 1 || 1.0 > limit; }

  // The first id whose cumulative unfiltered mass exceeds u times the total.
  int64_t invert(double u) {
    const double* mass = s.mass + row * s.tiles;
    const double target = u * total;
    double sum = 0, before = 0;
    int64_t tile = -1;
    for (int64_t j = 0; j < s.tiles && !(tile >= 0 && sum > target); ++j) {
      if (mass[j] > 0) tile = j, before = sum;
      sum += mass[j];
    }
    if (tile < 0) return s.argmax[row];
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
    if (id == never) return false;
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
    each_kept([&](const float* phi, const float* weights, const int64_t*, int64_t n) {
      for (int64_t i = 0; i < n; ++i) {
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
    each_kept([&](const float* phi, const float*, const int64_t* ids, int64_t n) {
      for (int64_t i = 0; i < n; ++i)
        if (bin(phi[i]) == cut) candidates.emplace_back(phi[i] == phi[i] ? phi[i] : -INFINITE, ids[i]);
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

  // Inverse CDF over the kept ids in ascending order. Weights are relative to the best of them: what `never` leaves to
  // the others may be too small for a number.
  int64_t invert_kept(const Cut& cut, double u) {
    int64_t chosen = -1, last = best();
    const float highest = value_at(s, row, last);
    if (highest == -INFINITE) return last;
    double kept = 0;
    auto each = [&](auto use) {
      each_kept([&](const float* phi, const float*, const int64_t* ids, int64_t n) {
        tile_weights(phi, n, highest, inverse_tau, weights_);
        for (int64_t i = 0; i < n; ++i)
          if (cut.keeps(phi[i], ids[i]) && ids[i] != never && weights_[i] > 0) use(weights_[i], ids[i]);
      });
    };
    each([&](float weight, int64_t) { kept += weight; });
    const double target = u * kept;
    double before = 0;
    each([&](float weight, int64_t id) {
      if (chosen >= 0) return;
      before += weight;
      last = id;
      if (before > target) chosen = id;
    });
    return chosen < 0 ? last : chosen;
  }

  int64_t draw(const int64_t* key) {
    if (certain()) return best();
    const int64_t first = invert(uniform(key, 0));
    if (keeps(first)) return first;
    const Cut cut = last_kept();
    for (uint32_t round = 1; round < MAX_REJECTIONS; ++round) {
      const int64_t x = invert(uniform(key, round));
      if (x != never && cut.keeps(value_at(s, row, x), x)) return x;
    }
    return invert_kept(cut, uniform(key, MAX_REJECTIONS));
  }

  // Minus the entropy, the token's probability, and the top-two margin of the filtered distribution.
  void filtered_stats(int64_t token, float* neg_entropy, float* probability, float* margin) {
    const float value = value_at(s, row, token);
    bool inside = true;
    double kept = 0, weighted = 0;  // sums of w and of w log w
    float second = -INFINITE;
    int64_t count = 0;
    if (std::isinf(limit) && top_k >= s.vocab) {
      kept = total, count = s.vocab;
      unfiltered(&weighted, &second);
    } else {
      const Cut cut = last_kept();
      inside = cut.keeps(value, token);
      const int64_t top = s.argmax[row];
      each_kept([&](const float* phi, const float* weights, const int64_t* ids, int64_t n) {
        for (int64_t i = 0; i < n; ++i) {
          if (!cut.keeps(phi[i], ids[i])) continue;
          kept += weights[i];
          if (weights[i] > 0) weighted += weights[i] * ((phi[i] - maximum) * inverse_tau);
          if (ids[i] != top) second = std::max(second, phi[i]);
          ++count;
        }
      });
    }
    auto share = [&](float phi) { return exponential((phi - maximum) * inverse_tau) / kept; };
    *neg_entropy = float(weighted / kept - std::log(kept));
    *probability = inside ? float(share(value)) : 0.0f;
    *margin = float(1.0 / kept - (count > 1 ? share(second) : 0.0));
  }

 private:
  // Where nothing is filtered the tiles know it all, without another pass over phi.
  void unfiltered(double* weighted, float* second) {
    const int64_t top = s.argmax[row], top_tile = top / TILE, start = top_tile * TILE, width = tile_width(s, top_tile);
    for (int64_t tile = 0; tile < s.tiles; ++tile) {
      const int64_t at = row * s.tiles + tile;
      const double delta = s.maximum[at] - maximum;
      if (delta == -std::numeric_limits<double>::infinity()) continue;
      const double z = delta * inverse_tau;
      *weighted += std::exp(z) * (s.t_tau[at] + z * s.s_tau[at]);
      if (tile != top_tile) *second = std::max(*second, float(s.maximum[at]));
    }
    const float* phi = load(s, row, start, width, phi_);
    for (int64_t i = 0; i < width; ++i)
      if (start + i != top) *second = std::max(*second, phi[i]);
  }

  // A logit below which no id is kept: V ids down there weigh less together than what top_p cuts off. -inf where top_p
  // cuts off nothing, or so little that rounding could matter.
  float floor() const {
    const double cut_off = total - limit;
    if (!(cut_off > 1e-5 * total)) return -INFINITE;
    const float value = float(maximum - (std::log(double(s.vocab) / cut_off) + 0.1) / inverse_tau);
    return value - std::fabs(value) * 1e-6f;
  }

  // Calls f(phi, weights, ids, n) tile by tile, in order, with all ids that may be kept.
  template <class F>
  void each_kept(F f) {
    const float lowest = floor();
    for (int64_t tile = 0; tile < s.tiles; ++tile) {
      if (s.maximum[row * s.tiles + tile] < lowest) continue;
      const int64_t start = tile * TILE, width = tile_width(s, tile);
      const float* phi = load(s, row, start, width, phi_);
      int64_t n = 0;
      for (int64_t i = 0; i < width; ++i) {  // no branch: what is not taken is overwritten
        const float value = phi[i];
        phi_[n] = value;  // n <= i, so nothing is overwritten before it is read
        ids_[n] = start + i;
        n += !(value < lowest);
      }
      tile_weights(phi_, n, maximum, inverse_tau, weights_);
      f(phi_, weights_, ids_, n);
    }
  }

  const State& s;
  const int64_t row, never;  // -1 where every id may be drawn
  const float maximum, inverse_tau;
  const double total;
  const int64_t top_k;
  const double limit;
  alignas(64) float phi_[TILE];
  alignas(64) float weights_[TILE];
  int64_t ids_[TILE];
};

}  // namespace
