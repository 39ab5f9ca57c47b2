// surgeon::routed_ffn_int8 and surgeon::router_scores_int8 on processors, without torch.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

#include "../sorting.h"
#include "int8.h"

namespace surgeon {

// Memory of a thread that is kept from call to call, in two places: a thread may work on a part while it holds a block.
template <int PLACE>
char* int8_scratch(int64_t bytes) {
  static thread_local std::unique_ptr<char, decltype(&std::free)> memory(nullptr, &std::free);
  static thread_local int64_t size = 0;
  if (bytes > size) {
    int64_t wanted = padded_to(bytes, 4096);
    size = 0;
    memory.reset(static_cast<char*>(std::aligned_alloc(4096, wanted)));
    if (!memory) throw std::bad_alloc();
    size = wanted;
  }
  return memory.get();
}

// Arrays one after the other; from null it finds how much they need.
struct Int8Space {
  char* base;
  int64_t used = 0;

  template <class T>
  T* take(int64_t count) {
    T* at = reinterpret_cast<T*>(base + used);
    used += padded_to(count * int64_t(sizeof(T)), 64);
    return at;
  }
};

// A block of tokens: what the router selects for them, and the sums of the experts' outputs.
class Int8Block {
 public:
  // parts: how many sums are kept beside each other.
  Int8Block(const Int8Layer& layer, const Int8Kernels& kernels, int64_t most, int64_t parts)
      : layer(layer), kernels(kernels), most(most) {
    Int8Space needed{nullptr};
    place(needed, parts);
    Int8Space space{int8_scratch<0>(needed.used)};
    place(space, parts);
  }

  // Read `count` tokens of x and select their experts.
  void enter(const void* x, Number number, int64_t count) {
    tokens.count = count;
    const Int8Router& router = layer.router;
    kernels.enter(router, x, number, count, &tokens, scores, work);
    kernels.thresholds(scores, count, router.experts, layer.rule, layer.tau, reinterpret_cast<float*>(work), least);
    for (int64_t t = 0; t < count; ++t)
      if (least[t] != least[t] && tokens.scale[t] == tokens.scale[t])
        least[t] = threshold_by_sorting(scores + t * router.experts, router.experts, layer.rule, layer.tau);
    kernels.select(scores, least, count, router.experts, bits);
    list();
  }

  // Run the experts from place `begin` to `end` of those that some token selected, and add them up in sum `part`.
  void run(int64_t begin, int64_t end, int64_t part, char* scratch) {
    float* to = y + part * apart();
    std::fill_n(to, tokens.count * pitch(), 0.f);
    kernels.experts(layer, tokens, used + begin, end - begin, to, scratch);
  }

  void leave(int64_t parts, void* out, Number number) const {
    kernels.leave(layer, tokens.count, tokens.scale, parts, apart(), y, out, number);
  }

  // Of pairs of a token and an expert that it selected, how many there are up to the expert at a place.
  int64_t pairs_before(int64_t place) const { return place < used_count ? start[used[place]] : start[layer.experts]; }
  int64_t experts() const { return used_count; }
  char* scratch() const { return work; }

 private:
  const Int8Layer& layer;
  const Int8Kernels& kernels;
  int64_t most, used_count = 0;
  Int8Tokens tokens{};
  float *scores, *least, *y;
  uint64_t* bits;
  uint16_t* token;
  int32_t *start, *next, *used;
  char* work;

  int64_t pitch() const { return padded_to(layer.d_out, LANES); }
  int64_t apart() const { return most * pitch(); }
  int64_t words() const { return (layer.router.experts + 63) / 64; }

  void place(Int8Space& space, int64_t parts) {
    int64_t scored = layer.router.experts;
    tokens.q = space.take<char>(most * kernels.row(layer.router.d_in));
    tokens.scale = space.take<float>(most);
    tokens.offset = space.take<int32_t>(most);
    scores = space.take<float>(most * scored + LANES);
    least = space.take<float>(most);
    bits = space.take<uint64_t>(most * words());
    tokens.token = token = space.take<uint16_t>(most * layer.experts);
    tokens.start = start = space.take<int32_t>(layer.experts + 1);
    next = space.take<int32_t>(layer.experts);
    used = space.take<int32_t>(layer.experts);
    y = space.take<float>(parts * apart());
    work = space.take<char>(std::max<int64_t>(kernels.scratch(layer), (scored + LANES) * sizeof(float)));
  }

  // f(expert) for those that run for a token: none for one that is not finite, whose result is NaN anyway.
  template <class F>
  void each(int64_t t, F f) const {
    if (tokens.scale[t] != tokens.scale[t]) return;
    for (int64_t e = 0; e < layer.shared; ++e) f(e);
    for (int64_t w = 0; w < words(); ++w)
      for (uint64_t left = bits[t * words() + w]; left; left &= left - 1)
        f(layer.shared + w * 64 + __builtin_ctzll(left));
  }

  // The tokens by expert.
  void list() {
    std::fill_n(start, layer.experts + 1, 0);
    for (int64_t t = 0; t < tokens.count; ++t) each(t, [&](int64_t e) { ++start[e + 1]; });
    used_count = 0;
    for (int64_t e = 0; e < layer.experts; ++e) {
      if (start[e + 1]) used[used_count++] = int32_t(e);
      start[e + 1] += start[e];
      next[e] = start[e];
    }
    for (int64_t t = 0; t < tokens.count; ++t) each(t, [&](int64_t e) { token[next[e]++] = uint16_t(t); });
  }
};

// Up to so many tokens threads share the experts, and each weight is read by one of them.
constexpr int64_t INT8_FEW = 32;
// Bytes of weights that are worth a thread.
constexpr int64_t INT8_LEAST = 1 << 17;

// y [tokens, d_out] of x [tokens, d_in]. number: the dtype of both. parallel(count, f): f(i) for i from 0 to count - 1, on
// up to `threads` threads.
template <class Parallel>
void routed_ffn_int8(
    const Int8Kernels& kernels, const Int8Layer& layer, const void* x, int64_t tokens, void* y, Number number,
    int64_t threads, Parallel parallel) {
  if (threads > 1 && tokens <= INT8_FEW) {
    Int8Block block(layer, kernels, tokens, threads);
    block.enter(x, number, tokens);
    int64_t weights = layer.neurons * (layer.router.d_in * (layer.gate ? 2 : 1) + layer.d_out);
    if (layer.w1_group) weights /= 2;
    int64_t parts = std::min(threads, block.experts() * weights / INT8_LEAST);
    if (parts <= 1) {
      block.run(0, block.experts(), 0, block.scratch());
      return block.leave(1, y, number);
    }
    // Each as many pairs.
    int64_t all = block.pairs_before(block.experts());
    auto bound = [&](int64_t part) {
      int64_t place = 0;
      while (place < block.experts() && block.pairs_before(place) * parts < all * part) ++place;
      return place;
    };
    parallel(parts, [&](int64_t part) {
      block.run(bound(part), bound(part + 1), part, int8_scratch<1>(kernels.scratch(layer)));
    });
    return block.leave(parts, y, number);
  }
  int64_t rounds = (tokens + INT8_BLOCK * threads - 1) / (INT8_BLOCK * threads);
  int64_t most = std::max<int64_t>(1, (tokens + rounds * threads - 1) / (rounds * threads));
  int64_t bytes = number == Number::f32 ? 4 : 2;
  parallel((tokens + most - 1) / most, [&](int64_t index) {
    int64_t first = index * most, count = std::min(most, tokens - first);
    Int8Block block(layer, kernels, count, 1);
    block.enter(static_cast<const char*>(x) + first * layer.router.d_in * bytes, number, count);
    block.run(0, block.experts(), 0, block.scratch());
    block.leave(1, static_cast<char*>(y) + first * layer.d_out * bytes, number);
  });
}

// scores [tokens, router.experts] of x [tokens, d_in].
template <class Parallel>
void router_scores_int8(
    const Int8Kernels& kernels, const Int8Router& router, const void* x, int64_t tokens, float* scores, Number number,
    int64_t threads, Parallel parallel) {
  Int8Layer layer{};
  layer.router = router;
  int64_t most = std::max<int64_t>(16, (tokens + threads - 1) / threads), bytes = number == Number::f32 ? 4 : 2;
  parallel((tokens + most - 1) / most, [&](int64_t index) {
    int64_t first = index * most, count = std::min(most, tokens - first);
    kernels.enter(
        router, static_cast<const char*>(x) + first * router.d_in * bytes, number, count, nullptr,
        scores + first * router.experts, int8_scratch<0>(kernels.scratch(layer)));
  });
}

}  // namespace surgeon
