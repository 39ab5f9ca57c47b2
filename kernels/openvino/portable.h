// A plain loop behind the interface of the int8 kernels.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <string>
#include <vector>

namespace surgeon {
struct Int8Layer {
  int64_t d_in, d_out, experts, shared, neurons, width;
  const float *x_scale, *fc1_scale, *fc1_bias, *fc2, *fc2_bias, *w1_scale, *b1, *gate_scale, *b_gate, *w2_scale,
      *y_scale, *b2;
  const int16_t* fc1;
  const int8_t *w1, *gate, *w2;
  std::string rule, hidden, output, activation;
};

inline float activate(const std::string& name, float z) {
  if (name == "relu") return std::max(z, 0.f);
  if (name == "gelu") return z * .5f * (1 + std::erf(z * .70710678f));
  if (name == "silu") return z / (1 + std::exp(-z));
  return z;
}

template <class Q, int DEPTH>
int64_t dot(const Q* panels, const int* q, int64_t row, int64_t columns) {
  int64_t blocks = (columns + DEPTH - 1) / DEPTH, sum = 0;
  for (int64_t k = 0; k < columns; ++k)
    sum += int64_t(q[k]) * panels[((row / 16 * blocks + k / DEPTH) * 16 + row % 16) * DEPTH + k % DEPTH];
  return sum;
}

inline float quantised(const float* z, int64_t n, int most, int* q) {
  float top = 0;
  for (int64_t i = 0; i < n; ++i) top = std::max(top, std::fabs(z[i]));
  float scale = top / most, by = scale == 0 ? 1 : scale;
  for (int64_t i = 0; i < n; ++i) q[i] = int(std::nearbyint(z[i] / by));
  return scale;
}

inline void run_token(const Int8Layer& l, const float* x, float tau, float* y) {
  int64_t scored = l.experts - l.shared;
  for (int64_t i = 0; i < l.d_in; ++i)
    if (!std::isfinite(x[i])) { std::fill(y, y + l.d_out, NAN); return; }
  std::vector<float> z(x, x + l.d_in), t(l.width), score(scored), h(l.neurons), out(l.d_out, 0.f);
  std::vector<int> q(std::max({l.d_in, l.neurons, int64_t(1)}));
  if (l.x_scale) for (int64_t i = 0; i < l.d_in; ++i) z[i] *= l.x_scale[i];
  const float* in = x;
  if (l.fc1) {
    float s = quantised(z.data(), l.d_in, 2047, q.data());
    for (int64_t r = 0; r < l.width; ++r) {
      float v = float(dot<int16_t, 2>(l.fc1, q.data(), r, l.d_in)) * (s * l.fc1_scale[r]) + (l.fc1_bias ? l.fc1_bias[r] : 0);
      t[r] = l.hidden == "relu" ? std::max(v, 0.f) : std::tanh(v);
    }
    in = t.data();
  }
  for (int64_t e = 0; e < scored; ++e) {
    float v = l.fc2_bias ? l.fc2_bias[e] : 0;
    for (int64_t r = 0; r < l.width; ++r) v += in[r] * l.fc2[e * l.width + r];
    score[e] = l.output == "abs" ? std::fabs(v) : l.output == "relu" ? std::max(v, 0.f) : l.output == "softplus" ? (v > 0.4f ? v + std::log1p(std::exp(-50 * v)) / 50 : std::log1p(std::exp(50 * v)) / 50) : l.output == "exp" ? std::exp(v) : 1 / (1 + std::exp(-v));
  }
  std::vector<float> sorted(score);
  std::sort(sorted.begin(), sorted.end());
  float threshold = 0;
  if (l.rule == "max") threshold = sorted.back() * tau;
  else if (l.rule == "top_k") threshold = sorted[std::min(scored - 1, int64_t(std::floor(tau * scored + 1e-4f)))];
  else {
    float all = 0, running = 0, share = l.rule == "energy" ? tau * tau : tau;
    auto amount = [&](float v) { return l.rule == "energy" ? v * v : v; };
    for (float v : sorted) all += amount(v);
    int64_t skips = 0;
    for (int64_t e = 0; e + 1 < scored; ++e) { running += amount(sorted[e]); skips += running < share * all; }
    threshold = sorted[skips];
  }
  float s = quantised(z.data(), l.d_in, 127, q.data());
  bool positive = l.activation == "relu_relu" || (!l.gate && (l.activation == "relu" || l.activation == "relu2" || l.activation == "relu6" || l.activation == "sigmoid" || l.activation == "softplus"));
  int64_t up = (l.neurons + 15) / 16 * ((l.d_in + 3) / 4) * 64, down = (l.d_out + 15) / 16 * ((l.neurons + 3) / 4) * 64;
  std::vector<int> qh(l.neurons);
  for (int64_t e = 0; e < l.experts; ++e) {
    if (e >= l.shared && score[e - l.shared] < threshold) continue;
    for (int64_t n = 0; n < l.neurons; ++n) {
      int64_t at = e * l.neurons + n;
      float v = float(dot<int8_t, 4>(l.w1 + e * up, q.data(), n, l.d_in)) * (s * l.w1_scale[at]) + (l.b1 ? l.b1[at] : 0);
      if (l.gate) {
        float g = float(dot<int8_t, 4>(l.gate + e * up, q.data(), n, l.d_in)) * (s * l.gate_scale[at]) + (l.b_gate ? l.b_gate[at] : 0);
        v *= activate(l.activation, g);
      } else v = activate(l.activation, v);
      h[n] = v * l.w2_scale[at];
    }
    float sh = quantised(h.data(), l.neurons, positive ? 255 : 127, qh.data());
    for (int64_t o = 0; o < l.d_out; ++o) out[o] += float(dot<int8_t, 4>(l.w2 + e * down, qh.data(), o, l.neurons)) * sh;
  }
  for (int64_t o = 0; o < l.d_out; ++o) y[o] = out[o] * l.y_scale[o] + (l.b2 ? l.b2[o] : 0);
}

inline void run(const Int8Layer& l, const float* x, float tau, int64_t tokens, float* y, const std::function<void(int64_t, const std::function<void(int64_t)>&)>& parallel) {
  parallel(tokens, [&](int64_t t) { run_token(l, x + t * l.d_in, tau, y + t * l.d_out); });
}
}  // namespace surgeon
