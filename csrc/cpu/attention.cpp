// Softmax attention on the CPU: the twins of sami_fast/reference/attention.py, in memory linear in the number of tokens.
//
// A piece of work is some queries of one head, taken QUERIES at a time over KEYS keys at a time. Its keys are first copied into the order
// in which products read them. A backward sums dQ along a row of tiles and dK, dV down the columns, in one sweep: P and dS are made once.
// Where there are few heads, they are cut into pieces whose dK and dV are added afterwards, in order. The cut depends on the shape alone.

#include <sami_fast/attention.h>

#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>

#include "common.h"
#include "tiles.h"

namespace sami_fast {
namespace {

constexpr int64_t QUERIES = 64, KEYS = 128;  // of a tile; four tiles and their operands fit the L2 cache
constexpr int64_t PIECES = 4;               // aimed at, to give as many threads work; each takes memory of its own
constexpr int64_t PIECE_QUERIES = 256;      // of a piece, at least, or another copy of the keys does not pay

constexpr int64_t STRIP = 16;               // rows that are transposed together
constexpr int64_t LANES = 8;                // partial sums of a row

int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// Scratch memory, handed out in aligned runs. One without memory only counts what would be needed.
class Scratch {
 public:
  Scratch() = default;
  explicit Scratch(size_t bytes) : memory_(static_cast<char*>(std::aligned_alloc(ALIGNMENT, bytes + ALIGNMENT))) {
    if (!memory_) throw std::bad_alloc();
  }

  template <class T>
  T* take(int64_t count) {
    const size_t start = used_;
    used_ += round_up(count * sizeof(T), ALIGNMENT);
    return memory_ ? reinterpret_cast<T*>(memory_.get() + start) : nullptr;
  }
  size_t used() const { return used_; }

 private:
  static constexpr size_t ALIGNMENT = 64;
  struct Free {
    void operator()(char* memory) const { std::free(memory); }
  };
  std::unique_ptr<char, Free> memory_;
  size_t used_ = 0;
};

// Rows of one head, with any strides.
template <class T>
struct Rows {
  T* data;
  int64_t stride_s, stride_d;

  Rows from(int64_t row) const { return {data + row * stride_s, stride_s, stride_d}; }
};

// A tensor [B, S, N, D] with any strides.
template <class T>
struct Heads {
  T* data = nullptr;
  int64_t b = 0, s = 0, n = 0, d = 0;

  Rows<T> head(int64_t batch, int64_t head) const { return {data + batch * b + head * n, s, d}; }
};

template <class T>
Heads<const T> heads(const Tensor& x) {
  return {input<T>(x), x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
}

template <class T>
Heads<T> result_heads(Tensor& x) {
  return {output<T>(x), x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
}

// factor * x [rows, size] -> [padded, ld], the rest zeros.
template <class T>
void pack_rows(const Rows<const T>& x, int64_t rows, int64_t padded, int64_t size, T factor, T* to, int64_t ld) {
  if (x.stride_d == 1) {
    for (int64_t i = 0; i < rows; ++i) {
      const T* from = x.data + i * x.stride_s;
      for (int64_t d = 0; d < size; ++d) to[i * ld + d] = factor * from[d];
    }
  } else if (x.stride_s == 1) {
    // A few rows at a time, so that the cache lines written to stay in the L1 cache until they are full.
    for (int64_t i = 0; i < rows; i += STRIP) {
      tiles::transpose(x.data + i, x.stride_d, size, std::min(STRIP, rows - i), factor, to + i * ld, ld);
    }
  } else {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t d = 0; d < size; ++d) to[i * ld + d] = factor * x.data[i * x.stride_s + d * x.stride_d];
    }
  }
  if (size < ld) {
    for (int64_t i = 0; i < rows; ++i) std::fill(to + i * ld + size, to + (i + 1) * ld, T(0));
  }
  std::fill(to + rows * ld, to + padded * ld, T(0));
}

// x [keys, size] -> panels [size, panel], each of the next `panel` keys: parts of x^T that a product reads from end to end.
template <class T>
void pack_panels(const Rows<const T>& x, int64_t keys, int64_t size, int64_t panel, T* to) {
  for (int64_t begin = 0; begin < keys; begin += panel, to += size * panel) {
    const int64_t count = std::min(panel, keys - begin);
    const T* from = x.data + begin * x.stride_s;
    if (x.stride_d == 1) {
      tiles::transpose(from, x.stride_s, count, size, T(1), to, panel);
    } else {
      for (int64_t d = 0; d < size; ++d) {
        for (int64_t j = 0; j < count; ++j) to[d * panel + j] = from[d * x.stride_d + j * x.stride_s];
      }
    }
    if (count < panel) {
      for (int64_t d = 0; d < size; ++d) std::fill(to + d * panel + count, to + (d + 1) * panel, T(0));
    }
  }
}

// to [rows, size] = a factor times `from`.
template <class T>
void store_rows(const Rows<T>& to, int64_t rows, int64_t size, const T* from, int64_t ld, T factor) {
  if (to.stride_d == 1) {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t d = 0; d < size; ++d) to.data[i * to.stride_s + d] = factor * from[i * ld + d];
    }
  } else if (to.stride_s == 1) {
    for (int64_t i = 0; i < rows; i += STRIP) {
      tiles::transpose(from + i * ld, ld, std::min(STRIP, rows - i), size, factor, to.data + i, to.stride_d);
    }
  } else {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t d = 0; d < size; ++d) to.data[i * to.stride_s + d * to.stride_d] = factor * from[i * ld + d];
    }
  }
}

// Dot product of two packed rows, whose width is a multiple of LANES.
template <class T>
T row_dot(const T* a, const T* b, int64_t width) {
  T lane[LANES] = {};
  for (int64_t d = 0; d < width; d += LANES) {
    for (int64_t l = 0; l < LANES; ++l) lane[l] += a[d + l] * b[d + l];
  }
  return ((lane[0] + lane[4]) + (lane[1] + lane[5])) + ((lane[2] + lane[6]) + (lane[3] + lane[7]));
}

// Sizes and how they are cut, the same for all launchers.
template <class T>
struct Plan {
  const TileOps<T>& ops = tile_ops<T>();
  int64_t batch, queries, keys, num_heads, size;
  T scale;
  bool causal;
  int64_t panel, width, ld, padded_keys, pieces, piece_queries;

  Plan(const Tensor& q, const Tensor& k, double scale, bool causal)
      : batch(q.size(0)),
        queries(q.size(1)),
        keys(k.size(1)),
        num_heads(q.size(2)),
        size(q.size(3)),
        scale(static_cast<T>(scale)),
        causal(causal) {
    panel = 2 * ops.lanes;
    width = round_up(size, std::max(ops.lanes, LANES));
    // Rows that are a multiple of 256 bytes apart would share the same sets of the L1 cache.
    ld = width * sizeof(T) % 256 == 0 ? width + 64 / sizeof(T) : width;
    padded_keys = round_up(keys, panel);
    const int64_t blocks = (queries + QUERIES - 1) / QUERIES, rows = batch * num_heads;
    pieces = std::max<int64_t>(1, std::min(rows == 0 ? 1 : (PIECES + rows - 1) / rows, queries / PIECE_QUERIES));
    piece_queries = (blocks + pieces - 1) / pieces * QUERIES;
  }

  // Distance between the two parts of lse.
  int64_t statistics() const { return batch * num_heads * queries; }

  // f(piece, scratch) for every piece, with scratch memory as `Buffers` lays it out.
  template <class Buffers, class F>
  void each_piece(const F& f) const {
    Scratch count;
    Buffers(*this, count);
    parallel(batch * num_heads * pieces, 1, [&](int64_t begin, int64_t end) {
      Scratch scratch(count.used());
      Buffers buffers(*this, scratch);
      for (int64_t i = begin; i < end; ++i) f(i, buffers);
    });
  }

  // f(query, rows) for every block of queries of a piece.
  template <class F>
  void each_query_block(int64_t piece, const F& f) const {
    const int64_t begin = piece % pieces * piece_queries, end = std::min(queries, begin + piece_queries);
    for (int64_t query = begin; query < end; query += QUERIES) f(query, std::min(QUERIES, end - query));
  }

  // f(key, columns) for every block of keys that some query of a block sees; columns are filled up to whole registers.
  template <class F>
  void each_key_block(int64_t query, int64_t rows, const F& f) const {
    const int64_t end = keys_seen(query + rows - 1, keys, causal);
    for (int64_t key = 0; key < end; key += KEYS) f(key, std::min(KEYS, round_up(keys - key, ops.lanes)));
  }

  // Logits that do not exist or are hidden become -infinity, those of queries that do not exist, too: there 0 times an infinite key is NaN.
  void hide(int64_t query, int64_t key, int64_t rows, int64_t columns, T* s, int64_t ld) const {
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t seen = query + i < queries ? std::max<int64_t>(0, keys_seen(query + i, keys, causal) - key) : 0;
      if (seen < columns) std::fill(s + i * ld + seen, s + i * ld + columns, -std::numeric_limits<T>::infinity());
    }
  }

  // c (+)= a x^T for rows a and packed panels x.
  void times_panels(const T* a, int64_t rows, const T* panels, int64_t key, int64_t columns, T* c, int64_t ldc, bool accumulate) const {
    ops.product(rows, columns, size, a, ld, panels + key * size, panel, panel * size, c, ldc, false, accumulate);
  }
  // c += p x for a tile p and packed rows x.
  void times_rows(const T* p, int64_t ldp, int64_t rows, int64_t key, int64_t columns, const T* x, T* c) const {
    ops.product(rows, width, std::min(columns, keys - key), p, ldp, x + key * ld, ld, panel, c, ld, false, true);
  }
  // c += p^T x for a tile p and a block of packed queries x.
  void transposed_times_rows(const T* p, int64_t ldp, int64_t rows, int64_t key, int64_t columns, const T* x, T* c) const {
    ops.product(std::min(columns, round_up(keys - key, 4)), width, rows, p, ldp, x, ld, panel, c + key * ld, ld, true, true);
  }
};

constexpr int64_t LD = KEYS + 16;  // of a tile of [queries, keys]; the 16 keep its rows from sharing the same sets of the L1 cache

// Scratch memory of a piece; each launcher takes only what it uses.
template <class T>
struct Common {
  explicit Common(const Plan<T>& plan) : plan(plan) {}

  T* tile(Scratch& scratch) { return scratch.take<T>(QUERIES * LD); }
  T* query_rows(Scratch& scratch) { return scratch.take<T>(QUERIES * plan.ld); }
  T* key_rows(Scratch& scratch) { return scratch.take<T>(plan.padded_keys * plan.ld); }
  T* key_panels(Scratch& scratch) { return scratch.take<T>(plan.padded_keys * plan.size); }
  T* column(Scratch& scratch) { return scratch.take<T>(QUERIES); }

  const Plan<T>& plan;
};

int64_t padded_rows(int64_t rows) { return round_up(rows, 4); }

// Row sums of a block of queries, padded with a value that makes P zero.
template <class T>
void load_column(const T* from, int64_t rows, T fill, T* to) {
  std::copy(from, from + rows, to);
  std::fill(to + rows, to + padded_rows(rows), fill);
}

// Sums of the gradients of keys and values: in scratch memory where a head is one piece, else in a part of a buffer for each piece, which
// are added up at the end.
template <class T>
class KeySums {
 public:
  KeySums(const Plan<T>& plan, const Tensor& like, Heads<T> dk, Heads<T> dv) : plan_(plan), dk_(dk), dv_(dv) {
    if (plan.pieces > 1) {
      buffer_ = torch::stable::new_empty(like, {plan.batch * plan.num_heads * plan.pieces, 2 * part()});
      parts_ = output<T>(buffer_);
    }
  }

  int64_t part() const { return plan_.padded_keys * plan_.ld; }

  // Zeroed [padded_keys, ld] for keys, followed by as much for values.
  T* begin(int64_t piece, T* scratch) const {
    T* sums = parts_ ? parts_ + piece * 2 * part() : scratch;
    std::fill(sums, sums + 2 * part(), T(0));
    return sums;
  }
  void end(int64_t piece, const T* sums) const {
    if (!parts_) store(piece, 0, plan_.keys, sums);
  }

  // Adds the parts of each head up.
  void finish() const {
    if (!parts_) return;
    constexpr int64_t STEP = 64;
    const int64_t steps = (plan_.keys + STEP - 1) / STEP;
    parallel(plan_.batch * plan_.num_heads * steps, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t head = i / steps, key = i % steps * STEP, rows = std::min(STEP, plan_.keys - key);
        T* sums = parts_ + head * plan_.pieces * 2 * part();
        for (int64_t half = 0; half < 2; ++half) {
          T* sum = sums + half * part() + key * plan_.ld;
          for (int64_t p = 1; p < plan_.pieces; ++p) {
            const T* more = sum + p * 2 * part();
            for (int64_t j = 0; j < rows * plan_.ld; ++j) sum[j] += more[j];
          }
        }
        store(head * plan_.pieces, key, rows, sums);
      }
    });
  }

 private:
  void store(int64_t piece, int64_t key, int64_t rows, const T* sums) const {
    const int64_t head = piece / plan_.pieces, b = head / plan_.num_heads, n = head % plan_.num_heads;
    store_rows(dk_.head(b, n).from(key), rows, plan_.size, sums + key * plan_.ld, plan_.ld, T(1));
    store_rows(dv_.head(b, n).from(key), rows, plan_.size, sums + part() + key * plan_.ld, plan_.ld, T(1));
  }

  const Plan<T>& plan_;
  Heads<T> dk_, dv_;
  Tensor buffer_;
  T* parts_ = nullptr;
};

template <class T>
struct ForwardBuffers : Common<T> {
  T *q, *k, *v, *s, *acc, *top, *total;

  ForwardBuffers(const Plan<T>& plan, Scratch& scratch) : Common<T>(plan) {
    q = this->query_rows(scratch), k = this->key_panels(scratch), v = this->key_rows(scratch), s = this->tile(scratch);
    acc = this->query_rows(scratch), top = this->column(scratch), total = this->column(scratch);
  }
};

template <class T>
void forward(const Plan<T>& plan, const Tensor& q_, const Tensor& k_, const Tensor& v_, Tensor& out_, Tensor& lse_) {
  const Heads<const T> q = heads<T>(q_), k = heads<T>(k_), v = heads<T>(v_);
  const Heads<T> out = result_heads<T>(out_);
  T* lse = output<T>(lse_);
  plan.template each_piece<ForwardBuffers<T>>([&](int64_t piece, ForwardBuffers<T>& at) {
    const int64_t head = piece / plan.pieces, b = head / plan.num_heads, n = head % plan.num_heads;
    pack_panels(k.head(b, n), plan.keys, plan.size, plan.panel, at.k);
    pack_rows(v.head(b, n), plan.keys, plan.keys, plan.size, T(1), at.v, plan.ld);
    plan.each_query_block(piece, [&](int64_t query, int64_t count) {
      const int64_t rows = padded_rows(count);
      pack_rows(q.head(b, n).from(query), count, rows, plan.size, plan.scale, at.q, plan.ld);
      std::fill(at.top, at.top + rows, -std::numeric_limits<T>::infinity());
      std::fill(at.total, at.total + rows, T(0));
      std::fill(at.acc, at.acc + rows * plan.ld, T(0));
      plan.each_key_block(query, count, [&](int64_t key, int64_t columns) {
        plan.times_panels(at.q, rows, at.k, key, columns, at.s, LD, false);
        plan.hide(query, key, rows, columns, at.s, LD);
        plan.ops.softmax(rows, columns, at.s, LD, at.top, at.total, at.acc, plan.ld, plan.width);
        plan.times_rows(at.s, LD, rows, key, columns, at.v, at.acc);
      });
      for (int64_t i = 0; i < count; ++i) {
        const T inverse = 1 / at.total[i];
        for (int64_t d = 0; d < plan.width; ++d) at.acc[i * plan.ld + d] *= inverse;
        lse[head * plan.queries + query + i] = at.top[i];
        lse[plan.statistics() + head * plan.queries + query + i] = std::log(at.total[i]);
      }
      store_rows(out.head(b, n).from(query), count, plan.size, at.acc, plan.ld, T(1));
    });
  });
}

template <class T>
struct BackwardBuffers : Common<T> {
  T *q, *grad_out, *out, *dq, *k, *k_panels, *v_panels, *sums, *s, *e, *top, *log_total, *delta;

  BackwardBuffers(const Plan<T>& plan, Scratch& scratch) : Common<T>(plan) {
    q = this->query_rows(scratch), grad_out = this->query_rows(scratch), out = this->query_rows(scratch), dq = this->query_rows(scratch);
    k = this->key_rows(scratch), k_panels = this->key_panels(scratch), v_panels = this->key_panels(scratch);
    sums = plan.pieces > 1 ? nullptr : scratch.take<T>(2 * plan.padded_keys * plan.ld);
    s = this->tile(scratch), e = this->tile(scratch);
    top = this->column(scratch), log_total = this->column(scratch), delta = this->column(scratch);
  }
};

template <class T>
void backward(
    const Plan<T>& plan, const Tensor& grad_out_, const Tensor& q_, const Tensor& k_, const Tensor& v_, const Tensor& out_,
    const Tensor& lse_, Tensor& dq_, Tensor& dk_, Tensor& dv_) {
  const Heads<const T> grad_out = heads<T>(grad_out_), q = heads<T>(q_), k = heads<T>(k_), v = heads<T>(v_), out = heads<T>(out_);
  const Heads<T> dq = result_heads<T>(dq_);
  const T* lse = input<T>(lse_);
  const KeySums<T> key_sums(plan, q_, result_heads<T>(dk_), result_heads<T>(dv_));
  plan.template each_piece<BackwardBuffers<T>>([&](int64_t piece, BackwardBuffers<T>& at) {
    const int64_t head = piece / plan.pieces, b = head / plan.num_heads, n = head % plan.num_heads;
    pack_rows(k.head(b, n), plan.keys, plan.keys, plan.size, T(1), at.k, plan.ld);
    pack_panels(k.head(b, n), plan.keys, plan.size, plan.panel, at.k_panels);
    pack_panels(v.head(b, n), plan.keys, plan.size, plan.panel, at.v_panels);
    T* sum_k = key_sums.begin(piece, at.sums);
    T* sum_v = sum_k + key_sums.part();
    plan.each_query_block(piece, [&](int64_t query, int64_t count) {
      const int64_t rows = padded_rows(count);
      // The scale goes into Q, from which it reaches the logits and dK.
      pack_rows(q.head(b, n).from(query), count, rows, plan.size, plan.scale, at.q, plan.ld);
      pack_rows(grad_out.head(b, n).from(query), count, rows, plan.size, T(1), at.grad_out, plan.ld);
      pack_rows(out.head(b, n).from(query), count, rows, plan.size, T(1), at.out, plan.ld);
      load_column(lse + head * plan.queries + query, count, T(0), at.top);
      load_column(lse + plan.statistics() + head * plan.queries + query, count, std::numeric_limits<T>::infinity(), at.log_total);
      for (int64_t i = 0; i < rows; ++i) at.delta[i] = row_dot(at.grad_out + i * plan.ld, at.out + i * plan.ld, plan.width);
      std::fill(at.dq, at.dq + rows * plan.ld, T(0));
      plan.each_key_block(query, count, [&](int64_t key, int64_t columns) {
        plan.times_panels(at.q, rows, at.k_panels, key, columns, at.s, LD, false);
        plan.times_panels(at.grad_out, rows, at.v_panels, key, columns, at.e, LD, false);
        plan.hide(query, key, rows, columns, at.s, LD);
        plan.ops.first(rows, columns, at.s, at.e, LD, at.top, at.log_total, at.delta);
        const T *p = at.s, *ds = at.e;
        plan.transposed_times_rows(p, LD, rows, key, columns, at.grad_out, sum_v);
        plan.transposed_times_rows(ds, LD, rows, key, columns, at.q, sum_k);
        plan.times_rows(ds, LD, rows, key, columns, at.k, at.dq);
      });
      store_rows(dq.head(b, n).from(query), count, plan.size, at.dq, plan.ld, plan.scale);
    });
    key_sums.end(piece, sum_k);
  });
  key_sums.finish();
}

template <class T>
struct TangentBuffers : Common<T> {
  T *q, *tq, *out, *acc, *past, *k, *tk, *v, *tv, *s, *t, *top, *log_total, *centre, *mass, *rest;

  TangentBuffers(const Plan<T>& plan, Scratch& scratch) : Common<T>(plan) {
    for (T** rows : {&q, &tq, &out, &acc, &past}) *rows = this->query_rows(scratch);
    for (T** panels : {&k, &tk}) *panels = this->key_panels(scratch);
    for (T** rows : {&v, &tv}) *rows = this->key_rows(scratch);
    for (T** tile : {&s, &t}) *tile = this->tile(scratch);
    for (T** column : {&top, &log_total, &centre, &mass, &rest}) *column = this->column(scratch);
  }
};

template <class T>
void tangent(
    const Plan<T>& plan, const Tensor& tq_, const Tensor& tk_, const Tensor& tv_, const Tensor& q_, const Tensor& k_, const Tensor& v_,
    const Tensor& out_, const Tensor& lse_, Tensor& tout_, Tensor& tau_) {
  const Heads<const T> tq = heads<T>(tq_), tk = heads<T>(tk_), tv = heads<T>(tv_), q = heads<T>(q_), k = heads<T>(k_), v = heads<T>(v_);
  const Heads<const T> out = heads<T>(out_);
  const Heads<T> tout = result_heads<T>(tout_);
  const T* lse = input<T>(lse_);
  T* tau = output<T>(tau_);
  plan.template each_piece<TangentBuffers<T>>([&](int64_t piece, TangentBuffers<T>& at) {
    const int64_t head = piece / plan.pieces, b = head / plan.num_heads, n = head % plan.num_heads;
    pack_panels(k.head(b, n), plan.keys, plan.size, plan.panel, at.k);
    pack_panels(tk.head(b, n), plan.keys, plan.size, plan.panel, at.tk);
    pack_rows(v.head(b, n), plan.keys, plan.keys, plan.size, T(1), at.v, plan.ld);
    pack_rows(tv.head(b, n), plan.keys, plan.keys, plan.size, T(1), at.tv, plan.ld);
    plan.each_query_block(piece, [&](int64_t query, int64_t count) {
      const int64_t rows = padded_rows(count);
      pack_rows(q.head(b, n).from(query), count, rows, plan.size, plan.scale, at.q, plan.ld);
      pack_rows(tq.head(b, n).from(query), count, rows, plan.size, plan.scale, at.tq, plan.ld);
      pack_rows(out.head(b, n).from(query), count, rows, plan.size, T(1), at.out, plan.ld);
      load_column(lse + head * plan.queries + query, count, T(0), at.top);
      load_column(lse + plan.statistics() + head * plan.queries + query, count, std::numeric_limits<T>::infinity(), at.log_total);
      for (T* column : {at.centre, at.mass, at.rest}) std::fill(column, column + rows, T(0));
      for (T* sum : {at.acc, at.past}) std::fill(sum, sum + rows * plan.ld, T(0));
      plan.each_key_block(query, count, [&](int64_t key, int64_t columns) {
        plan.times_panels(at.q, rows, at.k, key, columns, at.s, LD, false);
        plan.times_panels(at.tq, rows, at.k, key, columns, at.t, LD, false);
        plan.times_panels(at.q, rows, at.tk, key, columns, at.t, LD, true);
        plan.hide(query, key, rows, columns, at.s, LD);
        plan.ops.tangent(
            rows, columns, at.s, at.t, LD, at.top, at.log_total, at.centre, at.mass, at.rest, at.acc, at.past, plan.ld, plan.width);
        plan.times_rows(at.t, LD, rows, key, columns, at.v, at.acc);
        plan.times_rows(at.s, LD, rows, key, columns, at.tv, at.acc);
        if (key + KEYS < keys_seen(query + count - 1, plan.keys, plan.causal)) plan.times_rows(at.s, LD, rows, key, columns, at.v, at.past);
      });
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t d = 0; d < plan.size; ++d) at.acc[i * plan.ld + d] -= at.rest[i] * at.out[i * plan.ld + d];
        tau[head * plan.queries + query + i] = at.centre[i] + at.rest[i];
      }
      store_rows(tout.head(b, n).from(query), count, plan.size, at.acc, plan.ld, T(1));
    });
  });
}

template <class T>
struct SecondBuffers : Common<T> {
  T *q, *ggq, *grad_out, *out_bar, *out, *tout, *q_bar, *k, *ggk, *k_panels, *ggk_panels, *v_panels, *ggv_panels, *sums;
  T *s, *t, *e, *y, *top, *log_total, *tau, *delta, *y_mean;

  SecondBuffers(const Plan<T>& plan, Scratch& scratch) : Common<T>(plan) {
    for (T** rows : {&q, &ggq, &grad_out, &out_bar, &out, &tout, &q_bar}) *rows = this->query_rows(scratch);
    for (T** rows : {&k, &ggk}) *rows = this->key_rows(scratch);
    for (T** panels : {&k_panels, &ggk_panels, &v_panels, &ggv_panels}) *panels = this->key_panels(scratch);
    sums = plan.pieces > 1 ? nullptr : scratch.take<T>(2 * plan.padded_keys * plan.ld);
    for (T** tile : {&s, &t, &e, &y}) *tile = this->tile(scratch);
    for (T** column : {&top, &log_total, &tau, &delta, &y_mean}) *column = this->column(scratch);
  }
};

template <class T>
void second(
    const Plan<T>& plan, const Tensor& ggq_, const Tensor& ggk_, const Tensor& ggv_, const Tensor& grad_out_, const Tensor& q_,
    const Tensor& k_, const Tensor& v_, const Tensor& out_, const Tensor& lse_, const Tensor& tout_, const Tensor& tau_,
    const std::optional<Tensor>& out_bar_, Tensor& q_bar_, Tensor& k_bar_, Tensor& v_bar_) {
  const Heads<const T> ggq = heads<T>(ggq_), ggk = heads<T>(ggk_), ggv = heads<T>(ggv_), grad_out = heads<T>(grad_out_);
  const Heads<const T> q = heads<T>(q_), k = heads<T>(k_), v = heads<T>(v_), out = heads<T>(out_), tout = heads<T>(tout_);
  const bool joint = out_bar_.has_value();
  const Heads<const T> out_bar = joint ? heads<T>(*out_bar_) : Heads<const T>{};
  const Heads<T> q_bar = result_heads<T>(q_bar_);
  const T *lse = input<T>(lse_), *tau = input<T>(tau_);
  const KeySums<T> key_sums(plan, q_, result_heads<T>(k_bar_), result_heads<T>(v_bar_));
  plan.template each_piece<SecondBuffers<T>>([&](int64_t piece, SecondBuffers<T>& at) {
    const int64_t head = piece / plan.pieces, b = head / plan.num_heads, n = head % plan.num_heads;
    pack_rows(k.head(b, n), plan.keys, plan.keys, plan.size, T(1), at.k, plan.ld);
    pack_rows(ggk.head(b, n), plan.keys, plan.keys, plan.size, T(1), at.ggk, plan.ld);
    pack_panels(k.head(b, n), plan.keys, plan.size, plan.panel, at.k_panels);
    pack_panels(ggk.head(b, n), plan.keys, plan.size, plan.panel, at.ggk_panels);
    pack_panels(v.head(b, n), plan.keys, plan.size, plan.panel, at.v_panels);
    pack_panels(ggv.head(b, n), plan.keys, plan.size, plan.panel, at.ggv_panels);
    T* sum_k = key_sums.begin(piece, at.sums);
    T* sum_v = sum_k + key_sums.part();
    plan.each_query_block(piece, [&](int64_t query, int64_t count) {
      const int64_t rows = padded_rows(count);
      const auto pack = [&](const Heads<const T>& x, T factor, T* to) {
        pack_rows(x.head(b, n).from(query), count, rows, plan.size, factor, to, plan.ld);
      };
      pack(q, plan.scale, at.q);
      pack(ggq, plan.scale, at.ggq);
      pack(grad_out, T(1), at.grad_out);
      pack(out, T(1), at.out);
      pack(tout, T(1), at.tout);
      if (joint) pack(out_bar, T(1), at.out_bar);
      load_column(lse + head * plan.queries + query, count, T(0), at.top);
      load_column(lse + plan.statistics() + head * plan.queries + query, count, std::numeric_limits<T>::infinity(), at.log_total);
      load_column(tau + head * plan.queries + query, count, T(0), at.tau);
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t row = i * plan.ld;
        at.delta[i] = row_dot(at.grad_out + row, at.out + row, plan.width);
        at.y_mean[i] = row_dot(at.grad_out + row, at.tout + row, plan.width);
        if (joint) at.y_mean[i] += row_dot(at.out_bar + row, at.out + row, plan.width);
      }
      std::fill(at.q_bar, at.q_bar + rows * plan.ld, T(0));
      plan.each_key_block(query, count, [&](int64_t key, int64_t columns) {
        plan.times_panels(at.q, rows, at.k_panels, key, columns, at.s, LD, false);
        plan.times_panels(at.ggq, rows, at.k_panels, key, columns, at.t, LD, false);
        plan.times_panels(at.q, rows, at.ggk_panels, key, columns, at.t, LD, true);
        plan.times_panels(at.grad_out, rows, at.v_panels, key, columns, at.e, LD, false);
        plan.times_panels(at.grad_out, rows, at.ggv_panels, key, columns, at.y, LD, false);
        if (joint) plan.times_panels(at.out_bar, rows, at.v_panels, key, columns, at.y, LD, true);
        plan.hide(query, key, rows, columns, at.s, LD);
        plan.ops.second(rows, columns, at.s, at.t, at.e, at.y, LD, at.top, at.log_total, at.tau, at.delta, at.y_mean);
        const T *p = at.s, *tp = at.t, *ds = at.e, *s_bar = at.y;
        plan.transposed_times_rows(tp, LD, rows, key, columns, at.grad_out, sum_v);
        if (joint) plan.transposed_times_rows(p, LD, rows, key, columns, at.out_bar, sum_v);
        plan.transposed_times_rows(s_bar, LD, rows, key, columns, at.q, sum_k);
        plan.transposed_times_rows(ds, LD, rows, key, columns, at.ggq, sum_k);
        plan.times_rows(s_bar, LD, rows, key, columns, at.k, at.q_bar);
        plan.times_rows(ds, LD, rows, key, columns, at.ggk, at.q_bar);
      });
      store_rows(q_bar.head(b, n).from(query), count, plan.size, at.q_bar, plan.ld, plan.scale);
    });
    key_sums.end(piece, sum_k);
  });
  key_sums.finish();
}

void check_like(const char* name, const Tensor& x, const Tensor& like) {
  STD_TORCH_CHECK(x.scalar_type() == like.scalar_type(), name, ": another dtype than q");
  STD_TORCH_CHECK(x.dim() == 4, name, ": expected [B, S, N, D]");
  for (int64_t i = 0; i < 4; ++i) STD_TORCH_CHECK(x.size(i) == like.size(i), name, ": unexpected size of dimension ", i);
}

void check_primals(const Tensor& q, const Tensor& k, const Tensor& v, bool causal) {
  check_like("q", q, q);
  check_like("v", v, k);
  STD_TORCH_CHECK(k.scalar_type() == q.scalar_type(), "k: another dtype than q");
  STD_TORCH_CHECK(
      k.size(0) == q.size(0) && k.size(2) == q.size(2) && k.size(3) == q.size(3) && k.size(1) > 0, "k: does not fit q");
  STD_TORCH_CHECK(!causal || q.size(1) == k.size(1), "causal: expected as many queries as keys");
}

// [B, N, S] numbers of rows, contiguous; for lse two of them, [2, B, N, S].
Tensor statistics(const char* name, const Tensor& x, const Tensor& q, int64_t parts) {
  STD_TORCH_CHECK(x.scalar_type() == q.scalar_type(), name, ": another dtype than q");
  const int64_t last = x.dim() - 1;
  STD_TORCH_CHECK(
      last == (parts == 2 ? 3 : 2) && (parts == 1 || x.size(0) == parts) && x.size(last - 2) == q.size(0) &&
          x.size(last - 1) == q.size(2) && x.size(last) == q.size(1),
      name, ": expected ", parts == 2 ? "[2, B, N, S]" : "[B, N, S]");
  return torch::stable::contiguous(x);
}

std::tuple<Tensor, Tensor> attention_fwd(const Tensor& q, const Tensor& k, const Tensor& v, double scale, bool causal) {
  check_primals(q, k, v, causal);
  Tensor out = torch::stable::new_empty(q, q.sizes()), lse = torch::stable::new_empty(q, {2, q.size(0), q.size(2), q.size(1)});
  dispatch("attention_fwd", q, [&](auto kind) {
    using T = decltype(kind);
    forward<T>(Plan<T>(q, k, scale, causal), q, k, v, out, lse);
  });
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> attention_bwd(
    const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse, double scale,
    bool causal) {
  check_primals(q, k, v, causal);
  check_like("grad_out", grad_out, q);
  check_like("out", out, q);
  const Tensor rows = statistics("lse", lse, q, 2);
  Tensor dq = torch::stable::empty_like(q), dk = torch::stable::empty_like(k), dv = torch::stable::empty_like(v);
  dispatch("attention_bwd", q, [&](auto kind) {
    using T = decltype(kind);
    backward<T>(Plan<T>(q, k, scale, causal), grad_out, q, k, v, out, rows, dq, dk, dv);
  });
  return {dq, dk, dv};
}

std::tuple<Tensor, Tensor> attention_tan(
    const Tensor& tq, const Tensor& tk, const Tensor& tv, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
    const Tensor& lse, double scale, bool causal) {
  check_primals(q, k, v, causal);
  check_like("tq", tq, q);
  check_like("tk", tk, k);
  check_like("tv", tv, v);
  check_like("out", out, q);
  const Tensor rows = statistics("lse", lse, q, 2);
  Tensor tout = torch::stable::new_empty(q, q.sizes()), tau = torch::stable::new_empty(q, {q.size(0), q.size(2), q.size(1)});
  dispatch("attention_tan", q, [&](auto kind) {
    using T = decltype(kind);
    tangent<T>(Plan<T>(q, k, scale, causal), tq, tk, tv, q, k, v, out, rows, tout, tau);
  });
  return {tout, tau};
}

std::tuple<Tensor, Tensor, Tensor> attention_bwd_bwd(
    const Tensor& ggq, const Tensor& ggk, const Tensor& ggv, const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v,
    const Tensor& out, const Tensor& lse, const Tensor& tout, const Tensor& tau, double scale, bool causal, std::optional<Tensor> out_bar) {
  check_primals(q, k, v, causal);
  check_like("ggq", ggq, q);
  check_like("ggk", ggk, k);
  check_like("ggv", ggv, v);
  check_like("grad_out", grad_out, q);
  check_like("out", out, q);
  check_like("tout", tout, q);
  if (out_bar) check_like("out_bar", *out_bar, q);
  const Tensor rows = statistics("lse", lse, q, 2), tangents = statistics("tau", tau, q, 1);
  Tensor q_bar = torch::stable::empty_like(q), k_bar = torch::stable::empty_like(k), v_bar = torch::stable::empty_like(v);
  dispatch("attention_bwd_bwd", q, [&](auto kind) {
    using T = decltype(kind);
    second<T>(Plan<T>(q, k, scale, causal), ggq, ggk, ggv, grad_out, q, k, v, out, rows, tout, tangents, out_bar, q_bar, k_bar, v_bar);
  });
  return {q_bar, k_bar, v_bar};
}

}  // namespace
}  // namespace sami_fast

STABLE_TORCH_LIBRARY_IMPL(sami_fast_C, CPU, m) {
  m.impl("attention_fwd", TORCH_BOX(&sami_fast::attention_fwd));
  m.impl("attention_bwd", TORCH_BOX(&sami_fast::attention_bwd));
  m.impl("attention_tan", TORCH_BOX(&sami_fast::attention_tan));
  m.impl("attention_bwd_bwd", TORCH_BOX(&sami_fast::attention_bwd_bwd));
}
