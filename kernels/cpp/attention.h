// Attention of packed rows of different lengths that continue cached prefixes, and its gradient. Tensors are float32 or
// bfloat16, arithmetic is float32. Called by kernels/attention.py, which documents the layout.
//
// A task is one row and one key head: its keys and values are laid out once (keys also transposed), then blocks of
// queries pass by: scores, softmax, mix. Scores of one block stay in the cache; the products between them are small
// matrix products of their own, on tiles of registers.
#pragma once

#include <utility>
#include <vector>

#include "tiles.h"

namespace {

// Lanes of a vector register, and rows of the register tile: LANES * 2 columns times TILE_ROWS accumulators, so that
// they, two vectors of b and a factor fit the machine's registers.
#if defined(__AVX512F__)
constexpr int LANES = 16, TILE_ROWS = 12;
#elif defined(__AVX__) || defined(__aarch64__)
constexpr int LANES = 8, TILE_ROWS = 6;
#else
constexpr int LANES = 4, TILE_ROWS = 6;
#endif
constexpr int64_t COLUMNS = 2 * LANES;
constexpr int64_t QUERIES = 48;  // of one block

typedef float Vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

inline int64_t round_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

// c (ROWS, COLUMNS) = a (ROWS, depth) b (depth, COLUMNS), or += with `add`. Element (r, k) of a is a[r * a_row + k *
// a_step]; rows of b and c lie b_row and c_row floats apart.
template <int ROWS>
inline void tile(int64_t depth, const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_row, float* c,
                 int64_t c_row, bool add) {
  Vector sum[ROWS][2];
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < 2; ++v)
      sum[r][v] = add ? *reinterpret_cast<const Vector*>(c + r * c_row + v * LANES) : Vector{};
  for (int64_t k = 0; k < depth; ++k) {
    const Vector left = *reinterpret_cast<const Vector*>(b + k * b_row);
    const Vector right = *reinterpret_cast<const Vector*>(b + k * b_row + LANES);
    for (int r = 0; r < ROWS; ++r) {
      const float factor = a[r * a_row + k * a_step];
      sum[r][0] += factor * left;
      sum[r][1] += factor * right;
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < 2; ++v) *reinterpret_cast<Vector*>(c + r * c_row + v * LANES) = sum[r][v];
}

// The same for any number of rows up to ROWS.
template <int ROWS, class... Others>
inline void short_tile(int64_t rows, Others... others) {
  if (rows == ROWS) return tile<ROWS>(others...);
  if constexpr (ROWS > 1) short_tile<ROWS - 1>(rows, others...);
}

// The same for any number of rows, and columns in a multiple of COLUMNS.
void product(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t a_row, int64_t a_step,
             const float* b, int64_t b_row, float* c, int64_t c_row, bool add) {
  for (int64_t column = 0; column < columns; column += COLUMNS) {
    int64_t row = 0;
    for (; row + TILE_ROWS <= rows; row += TILE_ROWS)
      tile<TILE_ROWS>(depth, a + row * a_row, a_row, a_step, b + column, b_row, c + row * c_row + column, c_row, add);
    if (row < rows)
      short_tile<TILE_ROWS>(rows - row, depth, a + row * a_row, a_row, a_step, b + column, b_row,
                            c + row * c_row + column, c_row, add);
  }
}

}  // namespace

extern "C" {

// Cached keys and values of `length` tokens, (key_heads, length, size) each. Mirrored in kernels/attention.py.
struct Piece {
  const void *keys, *values;
  int64_t length;
};

// Queries q[q_start ..], own keys k[k_start ..], and the pieces that come before them.
struct Sequence {
  int64_t q_start, q_count, k_start, k_count, first_piece, pieces;
};

struct Attention {
  const void *q, *k, *v;  // packed: (queries, heads, size), (keys, key_heads, size) twice
  const Sequence* rows;
  const Piece* pieces;
  int64_t row_count, heads, key_heads, size;
  float scale;
  int32_t causal, dtype, threads;  // the dtype of all but `log_sums`
};
}

namespace {

// One row and key head: sizes, and its keys and values in one piece. T is what tensors hold; all work is in float32.
template <class T>
struct Task {
  const Attention& x;
  const Sequence& row;
  int64_t head, group, before, keys, wide, width;  // `wide`: keys, and `width`: size, rounded up to whole tiles

  Task(const Attention& x, int64_t number)
      : x(x), row(x.rows[number / x.key_heads]), head(number % x.key_heads), group(x.heads / x.key_heads), before(0) {
    for (int64_t p = 0; p < row.pieces; ++p) before += x.pieces[row.first_piece + p].length;
    keys = before + row.k_count;
    wide = round_up(keys, COLUMNS);
    width = round_up(x.size, COLUMNS);
  }

  int64_t queries() const { return row.q_count * group; }  // of one token the group's heads come together

  // Where query number `query` lies in q, out and their gradients.
  int64_t at(int64_t query) const {
    return ((row.q_start + query / group) * x.heads + head * group + query % group) * x.size;
  }

  // How many keys a query sees: with `causal` the row's last query sees all of them.
  int64_t seen(int64_t query) const { return x.causal ? keys - row.q_count + query / group + 1 : keys; }

  // use(index of the first key, keys, the first key's place, floats from key to key) for each run of keys.
  template <class Use>
  void each_run(bool values, Use use) const {
    int64_t index = 0;
    for (int64_t p = 0; p < row.pieces; ++p) {
      const Piece& piece = x.pieces[row.first_piece + p];
      use(index, piece.length, static_cast<const T*>(values ? piece.values : piece.keys) + head * piece.length * x.size,
          x.size);
      index += piece.length;
    }
    use(index, row.k_count, static_cast<const T*>(values ? x.v : x.k) + (row.k_start * x.key_heads + head) * x.size,
        x.key_heads * x.size);
  }

  // Keys or values (keys, width), or transposed (size, wide), padded with zeros.
  void lay_out(bool values, float* to) const {
    each_run(values, [&](int64_t index, int64_t count, const T* from, int64_t step) {
      for (int64_t i = 0; i < count; ++i) {
        float* target = to + (index + i) * width;
        std::copy(from + i * step, from + i * step + x.size, target);
        std::fill(target + x.size, target + width, 0.0f);
      }
    });
  }

  void lay_out_transposed(bool values, float* to) const {
    each_run(values, [&](int64_t index, int64_t count, const T* from, int64_t step) {
      int64_t i = 0;
      for (; i + LANES <= count; i += LANES)
        for (int64_t c = 0; c < x.size; ++c) {
          Vector column;
          for (int lane = 0; lane < LANES; ++lane) column[lane] = from[(i + lane) * step + c];
          *reinterpret_cast<Vector*>(to + c * wide + index + i) = column;
        }
      for (; i < count; ++i)
        for (int64_t c = 0; c < x.size; ++c) to[c * wide + index + i] = from[i * step + c];
    });
    for (int64_t c = 0; c < x.size; ++c) std::fill(to + c * wide + keys, to + (c + 1) * wide, 0.0f);
  }

  // Queries (or what lies like them) first .. first + count as rows of `width`, times `factor`.
  void gather(const void* tensor, int64_t first, int64_t count, float factor, float* to) const {
    for (int64_t i = 0; i < count; ++i) {
      const T* source = static_cast<const T*>(tensor) + at(first + i);
      float* target = to + i * width;
#pragma omp simd
      for (int64_t c = 0; c < x.size; ++c) target[c] = source[c] * factor;
      std::fill(target + x.size, target + width, 0.0f);
    }
  }

  // The other way round, a factor a query.
  void scatter(const float* from, int64_t first, int64_t count, const float* factors, void* tensor) const {
    for (int64_t i = 0; i < count; ++i) {
      const float* source = from + i * width;
      T* target = static_cast<T*>(tensor) + at(first + i);
#pragma omp simd
      for (int64_t c = 0; c < x.size; ++c) target[c] = source[c] * factors[i];
    }
  }
};

// exp(score - maximum) in place, 0 from `seen` to `end` (a multiple of COLUMNS). Returns the maximum and the sum.
inline std::pair<float, float> exponentials(float* scores, int64_t seen, int64_t end) {
  std::fill(scores + seen, scores + end, -INFINITE);
  float most[COLUMNS], sums[COLUMNS];
  for (int64_t c = 0; c < COLUMNS; ++c) most[c] = -INFINITE, sums[c] = 0;
  for (int64_t i = 0; i < end; i += COLUMNS)
#pragma omp simd
    for (int64_t c = 0; c < COLUMNS; ++c) most[c] = scores[i + c] > most[c] ? scores[i + c] : most[c];
  float maximum = -INFINITE, sum = 0;
  for (int64_t c = 0; c < COLUMNS; ++c) maximum = std::max(maximum, most[c]);
  for (int64_t i = 0; i < end; i += COLUMNS)
#pragma omp simd
    for (int64_t c = 0; c < COLUMNS; ++c) {
      const float weight = exponential(scores[i + c] - maximum);
      scores[i + c] = weight;
      sums[c] += weight;
    }
  for (int64_t c = 0; c < COLUMNS; ++c) sum += sums[c];
  return {maximum, sum};
}

inline void make_room(std::vector<float>& buffer, int64_t floats) {
  if (int64_t(buffer.size()) < floats) buffer.resize(floats);
}

template <class T>
void forward_task(const Task<T>& task, std::vector<float>& buffer, void* out, float* log_sums) {
  const Attention& x = task.x;
  make_room(buffer, 2 * task.width * task.wide + QUERIES * (2 * task.width + task.wide));
  float* keys = buffer.data();                               // (size, wide)
  float* values = keys + task.width * task.wide;      // (keys, width)
  float* q = values + task.wide * task.width;         // (QUERIES, width)
  float* mixed = q + QUERIES * task.width;            // (QUERIES, width)
  float* scores = mixed + QUERIES * task.width;       // (QUERIES, wide)
  task.lay_out_transposed(false, keys);
  task.lay_out(true, values);
  for (int64_t first = 0; first < task.queries(); first += QUERIES) {
    const int64_t count = std::min(QUERIES, task.queries() - first), seen = task.seen(first + count - 1);
    const int64_t end = round_up(seen, COLUMNS);
    task.gather(x.q, first, count, x.scale, q);
    product(count, end, x.size, q, task.width, 1, keys, task.wide, scores, task.wide, false);
    float factors[QUERIES];
    for (int64_t i = 0; i < count; ++i) {
      const auto [maximum, sum] = exponentials(scores + i * task.wide, task.seen(first + i), end);
      factors[i] = 1.0f / sum;
      if (log_sums) log_sums[task.at(first + i) / x.size] = maximum + std::log(sum);
    }
    product(count, task.width, seen, scores, task.wide, 1, values, task.width, mixed, task.width, false);
    task.scatter(mixed, first, count, factors, out);
  }
}

template <class T>
void backward_task(const Task<T>& task, std::vector<float>& buffer, const void* g, const void* out, const float* log_sums,
                   void* to_q, void* to_k, void* to_v) {
  const Attention& x = task.x;
  make_room(buffer, 3 * task.width * task.wide + QUERIES * (3 * task.width + 2 * task.wide) +
                        2 * task.row.k_count * task.width);
  float* keys = buffer.data();                                // (size, wide)
  float* values = keys + task.width * task.wide;       // (size, wide)
  float* rows_of_keys = values + task.width * task.wide;  // (keys, width)
  float* q = rows_of_keys + task.wide * task.width;    // (QUERIES, width), and so on
  float* d_out = q + QUERIES * task.width;
  float* d_q = d_out + QUERIES * task.width;
  float* weights = d_q + QUERIES * task.width;         // (QUERIES, wide)
  float* slopes = weights + QUERIES * task.wide;       // (QUERIES, wide)
  float* d_k = slopes + QUERIES * task.wide;           // (own keys, width)
  float* d_v = d_k + task.row.k_count * task.width;    // (own keys, width)
  task.lay_out_transposed(false, keys);
  task.lay_out_transposed(true, values);
  task.lay_out(false, rows_of_keys);
  std::fill(d_k, d_v + task.row.k_count * task.width, 0.0f);
  float scales[QUERIES];
  std::fill(scales, scales + QUERIES, x.scale);
  for (int64_t first = 0; first < task.queries(); first += QUERIES) {
    const int64_t count = std::min(QUERIES, task.queries() - first), last = task.seen(first + count - 1);
    const int64_t end = round_up(last, COLUMNS);
    task.gather(x.q, first, count, x.scale, q);
    task.gather(g, first, count, 1.0f, d_out);
    product(count, end, x.size, q, task.width, 1, keys, task.wide, weights, task.wide, false);
    product(count, end, x.size, d_out, task.width, 1, values, task.wide, slopes, task.wide, false);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t seen = task.seen(first + i), at = task.at(first + i);
      float *w = weights + i * task.wide, *s = slopes + i * task.wide;
      const float log_sum = log_sums[at / x.size];
      float along = 0;
#pragma omp simd reduction(+ : along)
      for (int64_t c = 0; c < x.size; ++c)
        along += float(static_cast<const T*>(g)[at + c]) * float(static_cast<const T*>(out)[at + c]);
      std::fill(w + seen, w + end, -INFINITE);
      for (int64_t j = 0; j < end; j += COLUMNS)
#pragma omp simd
        for (int64_t c = 0; c < COLUMNS; ++c) {
          w[j + c] = exponential(w[j + c] - log_sum);
          s[j + c] = w[j + c] * (s[j + c] - along);
        }
    }
    product(count, task.width, last, slopes, task.wide, 1, rows_of_keys, task.width, d_q, task.width, false);
    task.scatter(d_q, first, count, scales, to_q);
    const int64_t own = last - task.before;  // q holds the scale already
    product(own, task.width, count, slopes + task.before, 1, task.wide, q, task.width, d_k, task.width, true);
    product(own, task.width, count, weights + task.before, 1, task.wide, d_out, task.width, d_v, task.width, true);
  }
  for (int64_t i = 0; i < task.row.k_count; ++i) {
    const int64_t at = ((task.row.k_start + i) * x.key_heads + task.head) * x.size;
    std::copy(d_k + i * task.width, d_k + i * task.width + x.size, static_cast<T*>(to_k) + at);
    std::copy(d_v + i * task.width, d_v + i * task.width + x.size, static_cast<T*>(to_v) + at);
  }
}

// work(task, buffer) for every row and key head, each thread with a buffer of its own.
template <class Work>
void each_task(const Attention& x, Work work) {
  typed(x.dtype, [&](auto zero) {
#pragma omp parallel num_threads(x.threads)
    {
      const FlushDenormals guard;
      std::vector<float> buffer;
#pragma omp for schedule(dynamic, 1)
      for (int64_t number = 0; number < x.row_count * x.key_heads; ++number)
        work(Task<decltype(zero)>(x, number), buffer);
    }
  });
}

}  // namespace

extern "C" {

// out (queries, heads, size); log_sums (queries, heads) or null.
void attention(const Attention* x, void* out, float* log_sums) {
  each_task(*x, [&](const auto& task, auto& buffer) { forward_task(task, buffer, out, log_sums); });
}

// The gradients of q, k and v that follow from g (queries, heads, size). The pieces are frozen and have none.
void attention_gradient(const Attention* x, const void* g, const void* out, const float* log_sums, void* d_q,
                        void* d_k, void* d_v) {
  each_task(*x, [&](const auto& task, auto& buffer) {
    backward_task(task, buffer, g, out, log_sums, d_q, d_k, d_v);
  });
}
}
