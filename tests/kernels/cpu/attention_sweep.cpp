// Attention of many sizes. Each tensor has a heap allocation of exactly its size; results are compared with double
// precision. test_attention_sweep.py compiles it with sanitizers.
//
//   attention_sweep STRIDE   runs every STRIDE-th case; prints how many cases it ran

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>

#include "cpu.cpp"

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

// A tensor (batch, heads, tokens, channels) without slack, tokens before heads in memory if `turned`.
struct Heads {
  std::unique_ptr<float[]> data;
  NmHeads view;
  Heads(int64_t batch, int64_t heads, int64_t tokens, int64_t channels, bool turned, Random& r)
      : data(new float[batch * heads * tokens * channels]) {
    for (int64_t i = 0; i < batch * heads * tokens * channels; i++) data[i] = 2 * r.value();
    view = {data.get(), heads * tokens * channels, turned ? channels : tokens * channels,
            turned ? heads * channels : channels};
  }
  float at(int64_t b, int64_t h, int64_t t, int64_t c) const {
    return data[b * view.batch + h * view.head + t * view.token + c];
  }
};

void attend(int queries, int keys, int dim, int number, Random& r) {
  const int batch = 1 + r.below(2), heads = 1 + r.below(3), value_dim = number % 3 ? dim : 1 + r.below(40);
  const bool turned = number % 2;
  const Heads q(batch, heads, queries, dim, turned, r), k(batch, heads, keys, dim, turned, r);
  const Heads v(batch, heads, keys, value_dim, turned, r), bias(batch, 1, queries, keys, false, r);
  const bool biased = number % 4 < 2;
  if (biased && number % 8 == 0)
    for (int s = 0; s < keys; s++) bias.data[s] = -INFINITY;  // the first query sees no key
  std::unique_ptr<float[]> y(new float[(size_t)batch * queries * heads * value_dim]);
  NmAttention args{};
  args.query = q.view, args.key = k.view, args.value = v.view;
  if (biased) args.bias = {bias.data.get(), bias.view.batch, 0, bias.view.token};
  args.y = y.get();
  args.batch = batch, args.heads = heads, args.queries = queries, args.keys = keys;
  args.dim = dim, args.value_dim = value_dim, args.scale = 0.3f, args.threads = 1 + number % 3;
  if (nm_attention(&args)) abort();
  for (int check = 0; check < 6; check++) {
    const bool last = check == 0, first = check == 1;
    const int b = last ? batch - 1 : first ? 0 : r.below(batch), h = last ? heads - 1 : r.below(heads);
    const int n = last ? queries - 1 : first ? 0 : r.below(queries), c = last ? value_dim - 1 : r.below(value_dim);
    double sum = 0, weighted = 0;
    for (int s = 0; s < keys; s++) {
      double score = 0;
      for (int d = 0; d < dim; d++) score += (double)q.at(b, h, n, d) * k.at(b, h, s, d);
      const double e = std::exp(score * 0.3f + (biased ? bias.at(b, 0, n, s) : 0.0f));
      sum += e;
      weighted += e * v.at(b, h, s, c);
    }
    const double expected = sum == 0 ? 0 : weighted / sum;
    const double found = y[(((size_t)b * queries + n) * heads + h) * value_dim + c];
    if (!(std::fabs(found - expected) <= 1e-5)) {
      printf("case %d: got %g, expected %g\n", number, found, expected);
      exit(1);
    }
  }
}

}  // namespace

int main(int count, char** words) {
  const int every = count > 1 ? atoi(words[1]) : 1;
  const int tokens[] = {1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 24, 25, 31, 48, 63, 64, 65, 97, 200};
  const int dims[] = {1, 3, 4, 8, 15, 16, 17, 32, 40, 64, 72};
  int number = 0, checked = 0;
  for (int queries : tokens)
    for (int keys : tokens)
      for (int dim : dims) {
        if (number++ % every) continue;
        Random r{(uint64_t)number};
        attend(queries, keys, dim, checked++, r);
      }
  printf("%d of %d cases, %d lanes\n", checked, number, W);
  return 0;
}
