// Samples with a Gram matrix (gram.h): their scored rows, the columns that are left out, and their matrix of products.
#pragma once
#include "gram.h"
#include "isa.h"

namespace acqcore::ACQCORE_ISA {

// A sample with a Gram matrix. Row numbers count scored rows only.
struct Sample {
  int64_t begin, end;
  int64_t number;           // in GramArgs
  int64_t product;          // its first element in GramArgs::products
  int64_t gram;             // its first element in the caller's Grams
  int64_t* specials;        // its targets' columns in this weight, ascending
  int64_t special_count;
};

// Numbers of scored rows and of samples that have any.
struct Listed {
  int64_t rows, samples;
};

// Lists the rows whose target is not -100 and the samples; calls ignored(row) for the other rows. The matrix of a sample
// without scored rows is written: zeros.
template <typename Ignored>
inline Listed list_samples(const HeadArgs& head, const GramArgs& gram, int64_t* rows /* [N] */,
                           int64_t* specials /* [N] */, Sample* samples /* [gram.samples] */, const Ignored& ignored) {
  Listed listed = {0, 0};
  int64_t special_count = 0, product = 0;
  for (int64_t i = 0, next = 0; i < head.hidden.rows; ++i) {
    const bool covered = next < gram.samples && i >= gram.bounds[2 * next];
    if (covered && i == gram.bounds[2 * next]) {
      samples[listed.samples] = {listed.rows, listed.rows, next, product, 0, specials + special_count, 0};
      product += (gram.bounds[2 * next + 1] - i) * (gram.bounds[2 * next + 1] - i);
    }
    if (head.targets && head.targets[i] == -100) {
      ignored(i);
    } else {
      rows[listed.rows++] = i;
      if (covered) {
        const int64_t column = head.targets[i] - head.vocab_start;
        if (column >= 0 && column < head.weight.rows) specials[special_count++] = column;
      }
    }
    if (covered && i + 1 == gram.bounds[2 * next + 1]) {
      Sample& sample = samples[listed.samples];
      sample.end = listed.rows;
      sample.special_count = sort_distinct(sample.specials, specials + special_count - sample.specials);
      if (sample.end > sample.begin) {
        ++listed.samples;
      } else {
        const int64_t length = gram.bounds[2 * next + 1] - gram.bounds[2 * next];
        memset(gram.products + sample.product, 0, 4 * length * length);
      }
      ++next;
    }
  }
  return listed;
}

// Adds a tile's factors to a sample's Gram, except those in the columns of its targets, which become 0. Rows of factors
// past the sample's only reach entries that are never read.
inline void add_tile_to_gram(const Sample& sample, const GramLayout& layout, float* factors /* [padded, kTile] */,
                             const float* scale /* [padded] */, int64_t tile, int width, float* gram, float* scratch) {
  const int n = static_cast<int>(ceil_div(width, kLanes) * kLanes);
  for (int64_t s = lower_bound(sample.specials, sample.special_count, tile);
       s < sample.special_count && sample.specials[s] < tile + width; ++s) {
    for (int64_t i = 0; i < layout.rows; ++i) factors[i * kTile + sample.specials[s] - tile] = 0;
  }
  bool rescaled = false;
  for (int64_t i = 0; i < layout.rows; ++i) rescaled = rescaled || scale[i] != 1;
  if (rescaled) rescale_gram(scale, layout, gram);
  add_to_gram(factors, layout, n, gram, scratch);
}

// Adds up the Grams of a sample's slots, `stride` apart, and writes its matrix of products.
inline void write_products(const GramArgs& args, const Sample& sample, const GramLayout& layout, const int64_t* rows,
                           int64_t slots, const float* grams, int64_t stride,
                           const double* scale /* [slots, padded], of each row's factors */) {
  const int64_t begin = args.bounds[2 * sample.number];
  const int64_t length = args.bounds[2 * sample.number + 1] - begin;
  float* products = args.products + sample.product;
  if (layout.rows < length) memset(products, 0, 4 * length * length);
  for (int64_t s = 0; s < layout.rows; ++s) {
    const float* gram = grams + sample.gram + layout.row(s);
    const int64_t to = rows[sample.begin + s] - begin;
    for (int64_t t = s; t < layout.rows; ++t) {
      double sum = 0;
      for (int64_t slot = 0; slot < slots; ++slot) {
        sum += double(gram[slot * stride + t]) * scale[slot * layout.padded + s] * scale[slot * layout.padded + t];
      }
      const int64_t other = rows[sample.begin + t] - begin;
      products[to * length + other] = products[other * length + to] = static_cast<float>(sum);
    }
  }
}

}  // namespace acqcore::ACQCORE_ISA
