// Where CUTLASS says that the registers of ldmatrix and mma.sync.m16n8k16 lie: one line "name lane value offset" each. A is offset
// row + 16 * column, B column + 8 * k, D row + 16 * column; a matrix of ldmatrix is 64 elements, by rows.
#include <cuda_runtime.h>

#include <cstdio>

#include <cute/atom/copy_traits_sm75.hpp>
#include <cute/atom/mma_traits_sm80.hpp>

template <class Layout>
void show(const char* name, Layout layout, int values, int unit = 1) {
  for (int lane = 0; lane < 32; ++lane)
    for (int value = 0; value < values; ++value) std::printf("%s %d %d %d\n", name, lane, value, int(layout(lane, unit * value)) / unit);
}

template <class Instruction>
void show_mma(const char* a, const char* b, const char* d) {
  using Traits = cute::MMA_Traits<Instruction>;
  show(a, typename Traits::ALayout{}, 8);
  show(b, typename Traits::BLayout{}, 4);
  show(d, typename Traits::CLayout{}, 4);
}

int main() {
  show_mma<cute::SM80_16x8x16_F32BF16BF16F32_TN>("bfloat16_a", "bfloat16_b", "bfloat16_d");
  show_mma<cute::SM80_16x8x16_F32F16F16F32_TN>("float16_a", "float16_b", "float16_d");
  show("load", cute::Copy_Traits<cute::SM75_U32x4_LDSM_N>::DstLayout{}, 8, 16);
  show("load_trans", cute::Copy_Traits<cute::SM75_U16x8_LDSM_T>::DstLayout{}, 8, 16);
}
