// Convolutions and matrix products of many sizes for every N:M. Each tensor has a heap allocation of exactly its size;
// results are compared with sums in double precision. test_cpu_sanitizers.py compiles it with sanitizers.
//
//   kernel_sweep STRIDE [FIRST]   runs every STRIDE-th case, starting with case FIRST; prints how many cases it ran

#include "cpu.cpp"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>

namespace {

struct Random {
  uint64_t state;
  uint32_t next() {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    return (uint32_t)(state >> 33);
  }
  int below(int n) { return (int)(next() % n); }
  float value() { return (float)(next() % 2001) / 1000.0f - 1.0f; }
};

// An array without slack: AddressSanitizer reports an access to the element after the last.
template <class T> struct Exact {
  std::unique_ptr<T[]> data;
  size_t size;
  explicit Exact(size_t n) : data(new T[n]()), size(n) {}
  T& operator[](size_t i) { return data[i]; }
  T* get() { return data.get(); }
};

// A dense weight (outputs, taps, channels) with N of every M channels kept.
struct Sample {
  int outputs, taps, channels, n, m;
  std::vector<float> dense;

  Sample(int outputs, int taps, int channels, int n, int m, Random& r)
      : outputs(outputs), taps(taps), channels(channels), n(n), m(m), dense((size_t)outputs * taps * channels) {
    for (size_t group = 0; group < dense.size(); group += m) {
      int left = n;
      for (int i = 0; i < m; i++)
        if (r.below(m - i) < left) dense[group + i] = r.value() + 2.0f, left--;
    }
  }
  float at(int o, int column) const { return dense[(size_t)o * taps * channels + column]; }

  // Packs it in blocks of `wide` channels at `some` taps. Calls put(entry, value, column in the block) for each kept
  // value, and returns the number of entries.
  template <class Put> size_t pack(int wide, int some, Put put) const {
    size_t entry = 0;
    for (int c0 = 0; c0 < channels; c0 += wide)
      for (int t0 = 0; t0 < taps; t0 += some) {
        const int cs = std::min(wide, channels - c0), ts = std::min(some, taps - t0);
        const int entries = block_entries(LAYOUT_ROWS, cs * ts, n, m);
        for (int o = 0; o < outputs; o++) {
          int used = 0;
          for (int t = 0; t < ts; t++)
            for (int c = 0; c < cs; c++) {
              const float v = at(o, (t0 + t) * channels + c0 + c);
              if (v != 0) put(entry + used++, v, t * cs + c);
            }
          if (used > entries) abort();
          entry += entries;
        }
      }
    return entry;
  }
};

[[noreturn]] void fail(const char* what, double actual, double expected) {
  printf("%s: got %g, expected %g\n", what, actual, expected);
  exit(1);
}

void compare(const char* what, double actual, double expected, double scale, double tolerance) {
  if (!(std::fabs(actual - expected) <= tolerance * (1 + scale))) fail(what, actual, expected);
}

void convolution(int n, int m, int kh, int kw, int stride, int dilation, int groups, bool last, Random& r) {
  const int channels = m * groups, sections = 1 + r.below(2), outputs = sections * (1 + r.below(3));
  const int taps = kh * kw, images = 1 + r.below(2), all = sections * channels;
  const int ph = r.below(kh * dilation), pw = r.below(kw * dilation);
  const int h = std::max(1, dilation * (kh - 1) + 1 - 2 * ph) + r.below(4);
  const int w = std::max(1, dilation * (kw - 1) + 1 - 2 * pw) + r.below(20);
  const Convolution g{images, all, h, w, kh, kw, stride, stride, ph, pw, dilation, dilation};
  const Sample weight(outputs, taps, channels, n, m, r);
  const int wide = m * std::max(1, CONV_CHANNELS / m), parts = (taps * wide + CONV_COLUMNS - 1) / CONV_COLUMNS;
  const int some = (taps + parts - 1) / parts;
  const size_t entries = weight.pack(wide, some, [](size_t, float, int) {});
  Exact<float> values(entries), x((size_t)images * all * h * w), bias(outputs);
  Exact<float> y((size_t)images * outputs * g.out_h() * g.out_w());
  Exact<uint8_t> index(entries);
  weight.pack(wide, some, [&](size_t e, float v, int column) {
    if (column > 255) abort();
    values[e] = v;
    index[e] = (uint8_t)column;
  });
  for (size_t i = 0; i < x.size; i++) x[i] = r.value();
  for (int o = 0; o < outputs; o++) bias[o] = r.value();
  NmConv args{};
  args.x = x.get(), args.y = y.get();
  args.weight = {values.get(), index.get(), bias.get(), channels, outputs, n, m, LAYOUT_ROWS};
  args.images = images, args.height = h, args.width = w;
  args.kernel_h = kh, args.kernel_w = kw;
  args.stride_h = args.stride_w = stride;
  args.pad_h = ph, args.pad_w = pw;
  args.dilation_h = args.dilation_w = dilation;
  args.groups = sections, args.channels_last = last, args.threads = 1;
  if (nm_conv(&args)) abort();
  const int64_t oh = g.out_h(), ow = g.out_w();
  for (int check = 0; check < 6; check++) {  // a few outputs, the last one among them
    const int64_t at = check ? r.below((int)y.size) : (int64_t)y.size - 1;
    const int64_t image = at / (outputs * oh * ow), rest = at % (outputs * oh * ow);
    const int64_t o = last ? rest % outputs : rest / (oh * ow), pixel = last ? rest / outputs : rest % (oh * ow);
    double sum = bias[o], scale = 0;
    for (int t = 0; t < taps; t++)
      for (int c = 0; c < channels; c++) {
        const int64_t yy = pixel / ow * stride - ph + t / kw * dilation;
        const int64_t xx = pixel % ow * stride - pw + t % kw * dilation;
        if (yy < 0 || yy >= h || xx < 0 || xx >= w) continue;
        const int64_t channel = o / (outputs / sections) * channels + c;
        const int64_t from =
            last ? ((image * h + yy) * w + xx) * all + channel : ((image * all + channel) * h + yy) * w + xx;
        const float v = x[from];
        sum += (double)v * weight.at((int)o, t * channels + c);
        scale += std::fabs((double)v * weight.at((int)o, t * channels + c));
      }
    compare("convolution", y[at], sum, scale, 1e-5);
  }
}

// A matrix packed in LAYOUT_ROWS, X = float or bf16.
template <class X> struct Matrix {
  Exact<X> values;
  Exact<uint8_t> index;
  NmWeight weight(int inputs, int outputs, int n, int m) {
    return {values.get(), index.get(), nullptr, inputs, outputs, n, m, LAYOUT_ROWS};
  }
  static Matrix of(const Sample& s) {
    const int wide = block_columns(LAYOUT_ROWS, s.m);
    Matrix made{Exact<X>(s.pack(wide, 1, [](size_t, float, int) {})), Exact<uint8_t>(0)};
    made.index = Exact<uint8_t>(made.values.size);
    s.pack(wide, 1, [&](size_t e, float v, int column) {
      from_float(v, &made.values[e]);
      made.index[e] = (uint8_t)column;
    });
    return made;
  }
};

template <class X> void product(int n, int m, int groups, int format, Random& r) {
  const int k = m * groups, outputs = 1 + r.below(20), pixels = 1 + r.below(5), tokens = pixels * (1 + r.below(30));
  const Sample s(outputs, 1, k, n, m, r);
  auto packed = Matrix<X>::of(s);
  Exact<X> x((size_t)tokens * k), y((size_t)tokens * outputs);
  for (size_t i = 0; i < x.size; i++) from_float(r.value(), &x[i]);
  const bool half = sizeof(X) == 2;
  NmLinear args{};
  args.x = x.get(), args.y = y.get();
  args.weight = packed.weight(k, outputs, n, m);
  args.tokens = tokens, args.pixels = pixels;
  args.bf16 = half, args.format = format, args.threads = 1;
  if (nm_linear(&args)) abort();
  for (int check = 0; check < 6; check++) {
    const int t = check ? r.below(tokens) : tokens - 1, o = check ? r.below(outputs) : outputs - 1;
    double sum = 0, scale = 0;
    for (int c = 0; c < k; c++) {
      X w;
      from_float(s.at(o, c), &w);
      const size_t from = format ? ((size_t)t / pixels * k + c) * pixels + t % pixels : (size_t)t * k + c;
      const double v = to_float(x[from]) * to_float(w);
      sum += v;
      scale += std::fabs(v);
    }
    const X found = format ? y[((size_t)t / pixels * outputs + o) * pixels + t % pixels] : y[(size_t)t * outputs + o];
    compare("product", to_float(found), sum, scale, half ? 1e-2 : 1e-5);
  }
}

// A dense product in LAYOUT_PANELS, with residual, in several tasks.
void dense_product(Random& r) {
  const int k = 1 + r.below(900), outputs = 1 + r.below(70), tokens = 1 + r.below(60);
  const size_t panels = (outputs + PANEL_OUTPUTS - 1) / PANEL_OUTPUTS;
  Exact<float> values(panels * k * PANEL_OUTPUTS), bias(outputs), x((size_t)tokens * k), y((size_t)tokens * outputs);
  Exact<float> residual(y.size);
  auto at = [&](int o, int c) -> float& {
    return values[((size_t)o / PANEL_OUTPUTS * k + c) * PANEL_OUTPUTS + o % PANEL_OUTPUTS];
  };
  for (int o = 0; o < outputs; o++) {
    bias[o] = r.value();
    for (int c = 0; c < k; c++) at(o, c) = r.value();
  }
  for (size_t i = 0; i < x.size; i++) x[i] = r.value();
  for (size_t i = 0; i < y.size; i++) residual[i] = r.value();
  NmLinear args{};
  args.x = x.get(), args.residual = residual.get(), args.y = y.get();
  args.weight = {values.get(), nullptr, bias.get(), k, outputs, 1, 1, LAYOUT_PANELS};
  args.tokens = tokens, args.pixels = 1, args.threads = 1 + r.below(3);
  if (nm_linear(&args)) abort();
  for (int check = 0; check < 6; check++) {
    const int t = check ? r.below(tokens) : tokens - 1, o = check ? r.below(outputs) : outputs - 1;
    double sum = (double)bias[o] + residual[(size_t)t * outputs + o], scale = 0;
    for (int c = 0; c < k; c++) {
      const double v = (double)x[(size_t)t * k + c] * at(o, c);
      sum += v;
      scale += std::fabs(v);
    }
    compare("dense product", y[(size_t)t * outputs + o], sum, scale, 1e-5);
  }
}

// An MLP whose indices are random bytes. Results do not matter, only accesses to memory, which the sanitizers check.
void random_indices(int n, int m, int groups, Random& r) {
  const int k = m * groups, hidden = m * (1 + r.below(3)), outputs = 1 + r.below(r.below(4) ? 20 : 400);
  const int tokens = 1 + r.below(200);
  const Sample one(hidden, 1, k, n, m, r), two(outputs, 1, hidden, n, m, r);
  auto first = Matrix<float>::of(one), second = Matrix<float>::of(two);
  for (auto* packed : {&first, &second})
    for (size_t i = 0; i < packed->index.size; i++) packed->index[i] = (uint8_t)r.next();
  Exact<float> x((size_t)tokens * k), y((size_t)tokens * outputs);
  NmMlp args{};
  args.x = x.get(), args.y = y.get();
  args.first = first.weight(k, hidden, n, m);
  args.second = second.weight(hidden, outputs, n, m);
  args.tokens = tokens, args.activation = GELU, args.threads = 1 + r.below(3);
  if (nm_mlp(&args)) abort();
}

// A weight without columns: the output is the bias.
void no_columns(Random& r) {
  const int outputs = 1 + r.below(40), tokens = 1 + r.below(100);
  Exact<float> x(0), values(0), bias(outputs), y((size_t)tokens * outputs);
  Exact<uint8_t> index(0);
  for (int o = 0; o < outputs; o++) bias[o] = r.value();
  NmLinear args{};
  args.x = x.get(), args.y = y.get();
  args.weight = {values.get(), index.get(), bias.get(), 0, outputs, 2, 4, LAYOUT_ROWS};
  args.tokens = tokens, args.pixels = 1, args.threads = 1;
  if (nm_linear(&args)) abort();
  for (size_t i = 0; i < y.size; i++) compare("no columns", y[i], bias[i % outputs], 0, 0);
}

// Merges of any shape. Sizes add up, and a token that is alone at its place is unchanged.
void merging(Random& r) {
  const int batch = 1 + r.below(3), tokens = 2 + r.below(70), channels = 1 + r.below(40);
  const int heads = 1 + r.below(3), depth = 1 + r.below(40), prefix = r.below(std::min(4, tokens - 1));
  const int suffix = r.below(std::min(3, tokens - prefix - 1)), most = (tokens - prefix - suffix) / 2;
  if (!most) return;
  const int merged = 1 + r.below(most), left = tokens - merged;
  Exact<float> x((size_t)batch * tokens * channels), keys((size_t)batch * heads * tokens * depth);
  Exact<float> size((size_t)batch * tokens), saliency((size_t)batch * tokens);
  Exact<float> y((size_t)batch * left * channels), sizes((size_t)batch * left);
  Exact<int64_t> places((size_t)batch * tokens);
  for (size_t i = 0; i < x.size; i++) x[i] = r.value();
  for (size_t i = 0; i < keys.size; i++) keys[i] = r.below(50) ? (float)r.below(2) : std::nanf("");  // with many ties
  for (size_t i = 0; i < size.size; i++) size[i] = (float)r.below(4), saliency[i] = r.value();
  NmMerge a{};
  a.x = x.get(), a.keys = keys.get(), a.size = size.get(), a.saliency = r.below(2) ? saliency.get() : nullptr;
  a.y = y.get(), a.new_size = sizes.get(), a.places = places.get();
  a.x_image = (int64_t)tokens * channels, a.x_token = channels;
  a.keys_image = (int64_t)heads * tokens * depth, a.keys_head = (int64_t)tokens * depth, a.keys_token = depth;
  a.size_image = a.saliency_image = tokens, a.size_token = a.saliency_token = 1;
  a.batch = batch, a.tokens = tokens, a.channels = channels, a.heads = heads, a.depth = depth;
  a.r = merged, a.prefix = prefix, a.suffix = suffix, a.threads = 1 + r.below(3);
  a.saliency_weight = 0.2f, a.size_weight = r.below(2) ? 0.05f : 0.0f, a.keep_norm = r.below(2);
  if (nm_token_merge(&a)) fail("nm_token_merge", 1, 0);
  for (int image = 0; image < batch; image++) {
    std::vector<int> arrived(left, 0), last(left, -1);
    std::vector<double> sum(left, 0.0);
    for (int token = 0; token < tokens; token++) {
      const int64_t place = places[(size_t)image * tokens + token];
      if (place < 0 || place >= left) fail("place", (double)place, left);
      arrived[place]++, last[place] = token, sum[place] += size[(size_t)image * tokens + token];
    }
    for (int place = 0; place < left; place++) {
      const float* const to = y.get() + ((size_t)image * left + place) * channels;
      const float* const from = x.get() + ((size_t)image * tokens + last[place]) * channels;
      if (!arrived[place]) fail("tokens at a place", 0, 1);
      compare("size", sizes[(size_t)image * left + place], sum[place], sum[place], 1e-6);
      if (arrived[place] == 1 && memcmp(from, to, channels * sizeof(float))) fail("a token that stays", *to, *from);
      for (int c = 0; c < channels; c++)
        if (!std::isfinite(to[c])) fail("an average", to[c], 0);
    }
  }
}

}  // namespace

int main(int count, char** words) {
  const long every = count > 1 ? atol(words[1]) : 1, start = count > 2 ? atol(words[2]) : 0;
  const int kernels[][2] = {{1, 1}, {2, 2}, {3, 3}, {5, 5}, {7, 7}, {1, 7}, {3, 1}, {11, 11}};
  long number = 0, checked = 0;
  for (int m = 1; m <= 32; m++)
    for (int n = 1; n <= m; n++)
      for (const auto& kernel : kernels)
        for (int stride = 1; stride <= 3; stride++)
          for (int dilation = 1; dilation <= 2; dilation++)
            for (int groups = 1; groups <= 3; groups++, number++) {
              if (number % every != start % every) continue;
              Random r{(uint64_t)number};
              convolution(n, m, kernel[0], kernel[1], stride, dilation, groups, number / every % 2, r);
              if (++checked % 4) continue;
              product<float>(n, m, groups * (1 + r.below(5)), checked / 4 % 2, r);
              product<bf16>(n, m, groups, checked / 4 % 2, r);
              dense_product(r);
              random_indices(n, m, groups, r);
              no_columns(r);
              merging(r);
            }
  printf("%ld of %ld cases, %d lanes\n", checked, number, W);
  return 0;
}
