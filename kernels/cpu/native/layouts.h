// Memory layouts of packed weights, as layouts.py packs them. The kernels read and ops.cpp validates by these rules.
#pragma once

#include <algorithm>
#include <cstdint>

enum Layout { LAYOUT_ROWS = 0, LAYOUT_QUADS = 1, LAYOUT_RING = 2, LAYOUT_OCTS = 3, LAYOUT_PANELS = 4 };
constexpr int ROWS_BLOCK = 96, PAIRS_BLOCK = 64, OCTS_BLOCK = 96;
constexpr int PANEL_OUTPUTS = 16;  // outputs of a panel of a dense weight in LAYOUT_PANELS
constexpr int RING_ROWS = 4;       // consecutive output rows that share one entry count in LAYOUT_RING

// Every tile has as many rows as an index byte can address, so no index, whatever its origin, reads outside the tile.
// Rows that no block fills are never touched and cost no cache.
constexpr int TILE_ROWS = 256;

// Columns in a full block, for groups of m columns.
inline int block_columns(int layout, int m) {
  return layout == LAYOUT_ROWS ? ROWS_BLOCK / m * m : layout == LAYOUT_OCTS ? OCTS_BLOCK : PAIRS_BLOCK;
}

// Entries per row in a block of `columns` columns; LAYOUT_ROWS, LAYOUT_QUADS or LAYOUT_OCTS.
inline int block_entries(int layout, int columns, int n, int m) {
  if (layout == LAYOUT_QUADS) return (columns + 3) / 4;
  if (layout == LAYOUT_OCTS) return (columns + 7) / 8;
  int kept = columns / m * n + std::min(n, columns % m);
  return (kept + 3) / 4 * 4;
}

constexpr int CONV_COLUMNS = 96, CONV_CHANNELS = 10;  // maximum per block of a convolution, as in layouts.py

// How the columns of a convolution are cut into blocks: `channels` channels at `taps` taps.
struct ConvBlocks {
  int channels, taps;

  static ConvBlocks of(int taps, int m) {
    const int channels = m * std::max(1, CONV_CHANNELS / m);
    const int parts = (taps * channels + CONV_COLUMNS - 1) / CONV_COLUMNS;
    return {channels, (taps + parts - 1) / parts};
  }
};
