// How a packed weight lies in memory, as layouts.py has it: what the kernels read by, and what their callers check by.
#pragma once

#include <algorithm>
#include <cstdint>

enum Layout { LAYOUT_ROWS = 0, LAYOUT_QUADS = 1, LAYOUT_RING = 2, LAYOUT_OCTS = 3 };
constexpr int ROWS_BLOCK = 96, PAIRS_BLOCK = 64, OCTS_BLOCK = 96;
constexpr int RING_ROWS = 4;  // of RING, that share one number of entries

// Rows of every tile: as many as an index byte can name. No index, wherever it comes from, leads outside; rows that no
// block fills stay untouched and take no cache.
constexpr int TILE_ROWS = 256;

// Columns of a full block of a matrix whose groups are m long.
inline int block_columns(int layout, int m) {
  return layout == LAYOUT_ROWS ? ROWS_BLOCK / m * m : layout == LAYOUT_OCTS ? OCTS_BLOCK : PAIRS_BLOCK;
}

// How many entries a row has in a ROWS, QUADS or OCTS block of `count` columns.
inline int block_entries(int layout, int count, int n, int m) {
  if (layout == LAYOUT_QUADS) return (count + 3) / 4;
  if (layout == LAYOUT_OCTS) return (count + 7) / 8;
  int kept = count / m * n + std::min(n, count % m);
  return (kept + 3) / 4 * 4;
}
