// Matmuls with the experts that tokens chose (numerics/experts.py), in one parallel region a call. Built by cpu/build.py,
// called by cpu/experts.py; the kernels of each weight format come from its own library (mx_cpu.cpp).
//
// A choice is a (row of x, slot) pair. The choices of one expert are multiplied MAX_TOKENS at a time, so that its packed
// rows are read once for them. Experts that nobody chose are not read.

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#include "mx_cpu.h"
#include "mx_cpu_gate.h"

// Packed experts [count, rows, ...] and biases [count, rows] (float32 if `wide_bias`, otherwise bfloat16) or null.
struct Experts {
  const uint8_t* elements;
  const uint8_t* scales;
  const void* bias;
  int64_t count;
  int64_t rows;
  int64_t size;
  const Kernels* kernels;
  int wide_bias;
};

// `mx_experts`: x and y [tokens, hidden], chosen and weights [tokens, slots]. rounding: of the value between the two
// matmuls, and of x, which has been rounded so already; or null. round: the kernel for it where `down` cannot round.
struct ExpertsCall {
  Experts up;
  Experts down;
  Gate gate;
  const Rounding* rounding;
  void (*round)(const void* from, void* to, int wide, int64_t rows, int64_t size, const Rounding*, int max_threads);
  const void* x;
  const int64_t* chosen;
  const float* weights;
  void* y;
  int64_t tokens;
  int64_t slots;
  int wide;
};

namespace {

constexpr int64_t ROWS_PER_TASK = 128, COLUMNS_PER_TASK = 512;
constexpr size_t MAX_CHOICES = 8;  // of an expert, multiplied as it is packed, if pairs can be used for more

// Bytes of a value.
inline int64_t bytes_of(int wide) { return wide ? 4 : 2; }

template <class T>
T* offset(T* pointer, int64_t bytes) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return reinterpret_cast<Byte*>(pointer) + bytes;
}

// y[choice] = input[choice / slots] @ expert[chosen[choice]].T + bias, for all choices. `plan` is called by one thread,
// the other functions by all threads of a parallel region.
class GroupedMatmul {
 public:
  void plan(const Experts& experts, const int64_t* chosen, int64_t choices, int64_t slots, int wide_x, void* y, int wide) {
    weight = &experts;
    failed = false;
    inputs = choices / slots;
    lines = experts.kernels->prepared_bytes(experts.size) / 64;
    order.clear();
    for (int64_t choice = 0; choice < choices; ++choice)
      if (chosen[choice] >= 0 && chosen[choice] < experts.count)
        order.push_back({chosen[choice], choice});
      else
        std::memset(offset(y, choice * experts.rows * bytes_of(wide)), 0, experts.rows * bytes_of(wide));
    std::sort(order.begin(), order.end());
    make_products(experts.kernels->takes_pairs && !wide_x, wide);
    prepared.resize(few ? inputs * lines : 0);
    pairs.resize(many ? inputs * lines : 0);
    for (const Product& product : products) {
      const CacheLine* rows = is_many(product) ? pairs.data() : prepared.data();
      for (int64_t m = 0; m < product.tokens; ++m) {
        const int64_t i = product.x - x.data() + m;
        x[i] = rows + order[i].second / slots * lines;
        outputs[i] = offset(y, order[i].second * experts.rows * bytes_of(wide));
      }
    }
  }

  int64_t values() const { return int64_t(products.size()) * weight->rows * weight->size; }

  // Prepare the input at `row(index)` for each index; returns their layout. Ends with a barrier.
  template <class F>
  int prepare(int wide, const Rounding* rounding, int is_rounded, const F& row) {
    const auto all = [&](int layout, CacheLine* to) {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < inputs; ++i)
        if (!weight->kernels->prepare(row(i), wide, weight->size, rounding, is_rounded, layout, to + i * lines))
          failed = true;
    };
    if (many) all(PAIRS, pairs.data());
    if (!few) return VALUES;
    if (rounding != nullptr) all(ELEMENTS, prepared.data());
    if (rounding != nullptr && !failed) return ELEMENTS;
    all(VALUES, prepared.data());
    return VALUES;
  }

  // Ends with a barrier.
  void multiply(int layout) const {
    const int64_t tasks = (weight->rows + ROWS_PER_TASK - 1) / ROWS_PER_TASK;
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < int64_t(products.size()) * tasks; ++i) {
      const int64_t begin = i % tasks * ROWS_PER_TASK;
      const Product& product = products[i / tasks];
      weight->kernels->multiply(&product, is_many(product) ? PAIRS : layout, begin,
                                std::min(begin + ROWS_PER_TASK, weight->rows));
    }
  }

 private:
  static bool is_many(const Product& product) { return product.tokens > MAX_TOKENS; }

  // A product for each expert of `order`: of all its choices if they are many, else of MAX_TOKENS at a time.
  void make_products(bool takes_pairs, int wide) {
    products.clear();
    few = many = false;
    x.resize(order.size());
    outputs.resize(order.size());
    for (size_t begin = 0, end = 0; begin < order.size(); begin = end) {
      while (end < order.size() && order[end].first == order[begin].first) ++end;
      const bool all = takes_pairs && end - begin > MAX_CHOICES;
      (all ? many : few) = true;
      for (size_t i = begin; i < end; i += products.back().tokens)
        add(order[begin].first, i, all ? end - begin : std::min<size_t>(end - i, MAX_TOKENS), wide);
    }
  }

  void add(int64_t expert, size_t first_choice, size_t tokens, int wide) {
    const int64_t blocks = (weight->size + weight->kernels->block - 1) / weight->kernels->block;
    const int64_t row_bytes = blocks * weight->kernels->block * weight->kernels->bits / 8, first = expert * weight->rows;
    const void* bias = weight->bias == nullptr ? nullptr : offset(weight->bias, first * bytes_of(weight->wide_bias));
    products.push_back({weight->elements + first * row_bytes, weight->scales + first * blocks, bias, blocks,
                        int64_t(tokens), weight->wide_bias, wide, x.data() + first_choice, outputs.data() + first_choice});
  }

  const Experts* weight = nullptr;
  std::vector<std::pair<int64_t, int64_t>> order;  // (expert, choice)
  std::vector<Product> products;
  std::vector<const void*> x;  // of each of `order`
  std::vector<void*> outputs;
  std::vector<CacheLine> prepared, pairs;
  std::atomic<bool> failed{false};
  bool few = false, many = false;
  int64_t inputs = 0, lines = 0;
};

// Buffers of one calling thread, kept for its next call.
struct Scratch {
  GroupedMatmul up, down;
  std::vector<CacheLine> channels, h, outputs;

  static Scratch& local() {
    static thread_local Scratch scratch;
    return scratch;
  }
};

void* reserve(std::vector<CacheLine>& buffer, int64_t bytes) {
  if (int64_t(buffer.size()) * 64 < bytes) buffer.resize((bytes + 63) / 64);
  return buffer.data();
}

// y[token] = sum of weights[token, slot] * outputs[token, slot], in the order of slots. Called by all threads.
template <class T>
void weighted_sum(const float* outputs, const float* weights, T* y, int64_t tokens, int64_t slots, int64_t hidden) {
  const int64_t parts = (hidden + COLUMNS_PER_TASK - 1) / COLUMNS_PER_TASK;
#pragma omp for schedule(static)
  for (int64_t task = 0; task < tokens * parts; ++task) {
    const int64_t token = task / parts, begin = task % parts * COLUMNS_PER_TASK;
    const int64_t count = std::min(COLUMNS_PER_TASK, hidden - begin);
    float sums[COLUMNS_PER_TASK] = {};
    for (int64_t slot = 0; slot < slots; ++slot) {
      const float weight = weights[token * slots + slot];
      const float* output = outputs + (token * slots + slot) * hidden + begin;
      for (int64_t i = 0; i < count; ++i) sums[i] += weight * output[i];
    }
    for (int64_t i = 0; i < count; ++i) store(y, token * hidden + begin + i, sums[i]);
  }
}

// One choice: gate its channels into h, and round h here if `down` cannot.
void make_hidden(const ExpertsCall& call, const void* channels, void* h) {
  const int64_t inner = call.down.size;
  if (call.wide)
    apply_gate(static_cast<const float*>(channels), static_cast<float*>(h), inner, call.gate);
  else
    apply_gate(static_cast<const uint16_t*>(channels), static_cast<uint16_t*>(h), inner, call.gate);
  if (call.round != nullptr) call.round(h, h, call.wide, 1, inner, call.rounding, 1);
}

}  // namespace

extern "C" {

// y [rows * slots, experts->rows] = x [rows, experts->size] times the chosen experts; zeros for numbers that no expert
// has. x and y are float32 if `wide`, otherwise bfloat16.
void mx_grouped_linear(const Experts* experts, const void* x, const int64_t* chosen, void* y, int64_t rows, int64_t slots,
                       int wide, int max_threads) {
  GroupedMatmul& matmul = Scratch::local().up;
  matmul.plan(*experts, chosen, rows * slots, slots, wide, y, wide);
#pragma omp parallel num_threads(worthwhile_threads(matmul.values(), max_threads))
  {
    const int layout = matmul.prepare(wide, nullptr, 0, [&](int64_t row) {
      return offset(x, row * experts->size * bytes_of(wide));
    });
    matmul.multiply(layout);
  }
}

// y [rows, inner] = gate(channels [rows, 2 * inner]).
void mx_gate(const void* channels, void* y, int64_t rows, int64_t inner, const Gate* gate, int wide, int max_threads) {
#pragma omp parallel for num_threads(worthwhile_threads(rows * inner * 8, max_threads)) schedule(static)
  for (int64_t row = 0; row < rows; ++row)
    if (wide)
      apply_gate(static_cast<const float*>(channels) + row * 2 * inner, static_cast<float*>(y) + row * inner, inner, *gate);
    else
      apply_gate(static_cast<const uint16_t*>(channels) + row * 2 * inner, static_cast<uint16_t*>(y) + row * inner, inner, *gate);
}

void mx_experts(const ExpertsCall* call, int max_threads) {
  Scratch& scratch = Scratch::local();
  const int64_t choices = call->tokens * call->slots, hidden = call->down.rows, inner = call->down.size;
  void* channels = reserve(scratch.channels, choices * call->up.rows * bytes_of(call->wide));
  void* h = reserve(scratch.h, choices * inner * bytes_of(call->wide));
  float* outputs = static_cast<float*>(reserve(scratch.outputs, choices * hidden * 4));
  scratch.up.plan(call->up, call->chosen, choices, call->slots, call->wide, channels, call->wide);
  scratch.down.plan(call->down, call->chosen, choices, 1, call->wide, outputs, 1);
  const Rounding* rounding = call->round == nullptr ? call->rounding : nullptr;
#pragma omp parallel num_threads(worthwhile_threads(scratch.up.values() + scratch.down.values(), max_threads))
  {
    const int of_x = scratch.up.prepare(call->wide, rounding, 1, [&](int64_t token) {
      return offset(call->x, token * call->up.size * bytes_of(call->wide));
    });
    scratch.up.multiply(of_x);
#pragma omp for schedule(static)
    for (int64_t choice = 0; choice < choices; ++choice)
      make_hidden(*call, offset(channels, choice * call->up.rows * bytes_of(call->wide)),
                  offset(h, choice * inner * bytes_of(call->wide)));
    const int of_h = scratch.down.prepare(call->wide, rounding, 0, [&](int64_t choice) {
      return offset(h, choice * inner * bytes_of(call->wide));
    });
    scratch.down.multiply(of_h);
    if (call->wide)
      weighted_sum(outputs, call->weights, static_cast<float*>(call->y), call->tokens, call->slots, hidden);
    else
      weighted_sum(outputs, call->weights, static_cast<uint16_t*>(call->y), call->tokens, call->slots, hidden);
  }
}
}
