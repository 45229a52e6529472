// The segmented-K GEMM for sm_90a: CUTLASS's kernel layers for Hopper around a mainloop that goes over several pairs of operands.
//
// TMA brings tiles of X and W into shared memory, wgmma multiplies them from there. The mainloop is CUTLASS's own but for its loads and
// products: a segment's tiles follow those of the one before, each from the segment's own tensor maps, into the same accumulators.
#pragma once

#include <cutlass/cutlass.h>

#include <cute/tensor.hpp>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/fusion/sm90_callbacks_tma_warpspecialized.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#include "gemm_sm90.h"
#include "gemm_sm90_keep.cuh"

namespace peftops::lora::sm90 {

using namespace cute;  // NOLINT: its notation is its names

template <class Element>
struct CutlassType;
template <>
struct CutlassType<bfloat16> {
  using type = cutlass::bfloat16_t;
};
template <>
struct CutlassType<float16> {
  using type = cutlass::half_t;
};

using Cluster = Shape<Int<kSm90Cluster>, _1, _1>;

// CUTLASS's mainloop over segments. `kDown`: W lies as [depth, columns].
template <class Stock, bool kDown>
struct Mainloop : Stock {
  using typename Stock::MainloopPipeline, typename Stock::PipelineState, typename Stock::TileShape, typename Stock::TiledMma;
  using typename Stock::SmemLayoutA, typename Stock::SmemLayoutB, typename Stock::GmemTiledCopyA, typename Stock::GmemTiledCopyB;
  using typename Stock::StrideA, typename Stock::StrideB, typename Stock::InternalElementA, typename Stock::InternalElementB;

  static constexpr int kColumns = size<1>(TileShape{});

  struct alignas(1024) TensorStorage : Stock::TensorStorage {  // where the swizzle starts anew
    // Where the tile starts, row and column, with its first stage. Volatile: CUTLASS's barriers order nothing for the compiler.
    volatile int place[Stock::DispatchPolicy::Stages][2];
  };

  struct Arguments {
    const GemmTask* task;
  };

  // How a tile comes into shared memory, and the tensor map for it.
  using TmaX = decltype(make_tma_copy_A_sm90(
      GmemTiledCopyA{}, make_tensor(static_cast<const InternalElementA*>(nullptr), repeat_like(StrideA{}, int32_t(0)), StrideA{}),
      SmemLayoutA{}(_, _, Int<0>{}), TileShape{}, Cluster{}));
  using TmaW = decltype(make_tma_copy_B_sm90(
      GmemTiledCopyB{}, make_tensor(static_cast<const InternalElementB*>(nullptr), repeat_like(StrideB{}, int32_t(0)), StrideB{}),
      SmemLayoutB{}(_, _, Int<0>{}), TileShape{}, Cluster{}));

  struct Params {
    TmaDescriptor x[kMaxSegments], w[kMaxSegments];
    DepthTiles depth;
    bool adapter[kMaxSegments];
    int32_t awaiting;  // the segment that is the kernel before's work
    Scale scale;
    MaskBits mask;
    int64_t rows;
    uint32_t tma_transaction_bytes;
  };

  template <class ProblemShape>
  static Params to_underlying_arguments(const ProblemShape&, const Arguments& arguments, void*) {
    const GemmTask& task = *arguments.task;
    Params params{};
    params.depth = depth_tiles(task);
    params.scale = task.scale, params.mask = task.mask, params.rows = task.rows;
    params.tma_transaction_bytes = Stock::TmaTransactionBytes;
    const auto rows = static_cast<int32_t>(task.rows), columns = static_cast<int32_t>(task.columns);
    for (int j = task.count - 1; j >= 0; --j) {
      const Segment& segment = task.segments[j];
      const auto depth = static_cast<int32_t>(segment.depth);
      // The stride of a single row is not used, but must be one that TMA takes.
      StrideA x_stride{};
      get<0>(x_stride) = rows > 1 ? segment.x_stride : round_up(segment.depth, 8);
      StrideB w_stride{};
      if constexpr (kDown)
        get<1>(w_stride) = depth > 1 ? segment.w_stride : round_up(task.columns, 8);
      else
        get<0>(w_stride) = columns > 1 ? segment.w_stride : round_up(segment.depth, 8);
      const auto* x = static_cast<const InternalElementA*>(segment.x);
      const auto* w = static_cast<const InternalElementB*>(segment.w);
      const TmaX tma_x = make_tma_copy_A_sm90(GmemTiledCopyA{}, make_tensor(x, make_layout(make_shape(rows, depth, 1), x_stride)),
                                              SmemLayoutA{}(_, _, Int<0>{}), TileShape{}, Cluster{});
      const TmaW tma_w = make_tma_copy_B_sm90(GmemTiledCopyB{}, make_tensor(w, make_layout(make_shape(columns, depth, 1), w_stride)),
                                              SmemLayoutB{}(_, _, Int<0>{}), TileShape{}, Cluster{});
      params.x[j] = *tma_x.get_tma_descriptor();
      params.w[j] = *tma_w.get_tma_descriptor();
      params.adapter[j] = segment.adapter;
      if (segment.adapter) params.awaiting = j;
    }
    return params;
  }

  CUTLASS_DEVICE static void prefetch_tma_descriptors(const Params& params) {
    for (int j = 0; j < params.depth.count; ++j) {
      prefetch_tma_descriptor(&params.x[j]);
      prefetch_tma_descriptor(&params.w[j]);
    }
  }

  // Coordinates are the same in every segment's tensor maps.
  template <class ProblemShape>
  CUTLASS_DEVICE auto load_init(const ProblemShape& problem, const Params&) const {
    auto [m, n, k, l] = problem;
    auto x = local_tile(TmaX{}.get_tma_tensor(make_shape(m, k, l)), TileShape{}, make_coord(_, _, _), Step<_1, Underscore, _1>{});
    auto w = local_tile(TmaW{}.get_tma_tensor(make_shape(n, k, l)), TileShape{}, make_coord(_, _, _), Step<Underscore, _1, _1>{});
    return make_tuple(x, w);
  }

  // The producer's part of an output tile, in one warp.
  template <class TensorX, class TensorW, class Tiles, class Place>
  CUTLASS_DEVICE void load(const Params& params, MainloopPipeline pipeline, PipelineState write, const tuple<TensorX, TensorW>& inputs,
                           const Place& place, Tiles, int, int, uint32_t block_in_cluster, TensorStorage& storage) {
    if (!elect_one_sync()) return;
    auto [m, n, k, l] = place;
    auto shared_x = make_tensor(make_smem_ptr(storage.smem_A.data()), SmemLayoutA{});
    auto shared_w = make_tensor(make_smem_ptr(storage.smem_B.data()), SmemLayoutB{});
    // This block's part of what it loads for the cluster: all of X, half of W.
    const TmaX tma_x{};
    const TmaW tma_w{};
    auto part_x = tma_x.get_slice(0);
    auto part_w = tma_w.get_slice(block_in_cluster);
    auto from_x = part_x.partition_S(get<0>(inputs)(_, _, m, _, l));
    auto from_w = part_w.partition_S(get<1>(inputs)(_, _, n, _, l));
    auto to_x = part_x.partition_D(shared_x);
    auto to_w = part_w.partition_D(shared_w);
    constexpr uint16_t kBoth = (1 << kSm90Cluster) - 1;

    const auto is_off = [&] { return params.scale.host * (params.scale.device ? *params.scale.device : 1.0f) == 0.0f; };
    for (int segment = 0; segment < params.depth.count; ++segment) {
      if (segment == params.awaiting) wait_for_kernel_before();
      const int tiles = params.depth.tiles[segment];
      // Beyond the depth there are zeros: what is left out adds exactly that.
      const int first = params.adapter[segment] && is_off() ? tiles : 0;
      CUTLASS_PRAGMA_NO_UNROLL
      for (int tile = 0; tile < tiles; ++tile) {
        const int stage = write.index();
        if constexpr (kDown) {
          if (segment == 0 && tile == 0 && params.mask.data) {
            while (pipeline.producer_try_acquire(write) != cutlass::BarrierStatus::WaitDone) {
            }
            storage.place[stage][0] = m * size<0>(TileShape{});
            storage.place[stage][1] = n * kColumns;
          }
        }
        pipeline.producer_acquire(write);
        auto* barrier = pipeline.producer_get_barrier(write);
        copy(tma_x.with(&params.x[segment], *barrier), from_x(_, _, _, first + tile), to_x(_, _, _, stage));
        copy(tma_w.with(&params.w[segment], *barrier, kBoth), from_w(_, _, _, first + tile), to_w(_, _, _, stage));
        ++write;
      }
    }
  }

  // A consumer warpgroup's part of an output tile. At most one tile's products are under way while the next one's are issued.
  template <class Accumulators>
  CUTLASS_DEVICE void mma(MainloopPipeline pipeline, PipelineState read, Accumulators& sums, int, int thread, TensorStorage& storage,
                          const Params& params) {
    auto shared_x = make_tensor(make_smem_ptr(storage.smem_A.data()), SmemLayoutA{});
    auto shared_w = make_tensor(make_smem_ptr(storage.smem_B.data()), SmemLayoutB{});
    TiledMma product;
    constexpr int kWarpgroup = cutlass::NumThreadsPerWarpGroup;
    auto part = product.get_slice(__shfl_sync(0xffffffffu, thread / kWarpgroup, 0) * kWarpgroup);
    auto x = part.make_fragment_A(part.partition_A(shared_x));  // descriptors [.., row tiles, blocks, stages]
    auto w = part.make_fragment_B(part.partition_B(shared_w));
    static_assert(size<2>(x) == kDepthBlocks);

    PipelineState done = read;
    bool under_way = false;
    const auto wait = [&] { pipeline.consumer_wait(read, pipeline.consumer_try_wait(read)); };
    const auto multiply = [&](auto block) {
      gemm(product, x(_, _, block, read.index()), w(_, _, block, read.index()), sums);
      product.accumulate_ = GMMA::ScaleOut::One;
    };
    const auto next = [&] {
      warpgroup_wait<1>();
      warpgroup_fence_operand(sums);
      if (under_way) {
        pipeline.consumer_release(done);
        ++done;
      }
      under_way = true;
      ++read;
    };

    using Bits = KeepBits<size<0>(TileShape{}), kColumns, size(TiledMma{})>;
    static_assert(is_same_v<typename TiledMma::AtomLayoutC_TV, GMMA::CLayout_64xN<kColumns>>);  // as Bits has it
    Bits bits;
    product.accumulate_ = GMMA::ScaleOut::Zero;
    warpgroup_fence_operand(sums);
    for (int segment = 0; segment < params.depth.count; ++segment) {
      const int blocks = params.depth.last_blocks[segment];
      const int whole = params.depth.tiles[segment] - (blocks < kDepthBlocks);
      if constexpr (kDown) {
        if (segment == 0 && params.mask.data) {
          wait();
          const auto& place = storage.place[read.index()];
          bits.load(params.mask, params.rows, make_int2(place[0], place[1]), thread);
        }
      }
      CUTLASS_PRAGMA_NO_UNROLL
      for (int tile = 0; tile < whole; ++tile) {
        wait();
        warpgroup_fence_operand(sums);
        warpgroup_arrive();
        for_each(make_int_sequence<kDepthBlocks>{}, multiply);
        warpgroup_commit_batch();
        next();
      }
      if (blocks < kDepthBlocks) {
        wait();
        CUTLASS_PRAGMA_NO_UNROLL
        for (int block = 0; block < blocks; ++block) {
          warpgroup_fence_operand(sums);
          warpgroup_arrive();
          multiply(block);
          warpgroup_commit_batch();
        }
        next();
      }
      if constexpr (kDown) {
        if (segment == 0 && params.mask.data) {
          warpgroup_wait<0>();
          warpgroup_fence_operand(sums);
          Bits::apply(
              thread, [&](int j, int i, int g, int m) -> float& { return sums(make_coord(j, i, g), m, 0); },
              [&](int row, int word, int lane) { return __shfl_sync(0xffffffffu, bits.words[row][word], lane, 4); });
          warpgroup_fence_operand(sums);
        }
      }
    }
  }
};

// The kernel of a type, a candidate and a layout of W.
template <class Element, bool kDown, int kCandidate>
struct Gemm {
  using Type = typename CutlassType<Element>::type;
  static constexpr Sm90Tile kTile = kSm90Tiles[kCandidate];
  static constexpr bool kTogether = kTile.columns == 256;  // both consumer warpgroups on one tile
  using Tile = Shape<Int<kTile.rows>, Int<kTile.columns>, Int<kDepthTile>>;
  using RowMajor = cutlass::layout::RowMajor;
  using Hopper = cutlass::arch::Sm90;
  using TensorOp = cutlass::arch::OpClassTensorOp;
  static constexpr int kAlignment = 8;

  template <template <class> class Function, class... Inputs>
  using Visit = cutlass::epilogue::fusion::Sm90EVT<
      cutlass::epilogue::fusion::Sm90Compute<Function, Type, float, cutlass::FloatRoundStyle::round_to_nearest>, Inputs...>;
  template <class T>
  using Row = cutlass::epilogue::fusion::Sm90RowBroadcast<0, Tile, T>;
  // column_scale * sum + bias
  using Fusion = Visit<cutlass::homogeneous_multiply_add, Row<float>, cutlass::epilogue::fusion::Sm90AccFetch, Row<Type>>;

  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      Hopper, TensorOp, Tile, Cluster, cutlass::epilogue::collective::EpilogueTileAuto, float, float, void, RowMajor, kAlignment, Type,
      RowMajor, kAlignment,
      std::conditional_t<kTogether, cutlass::epilogue::TmaWarpSpecializedCooperative, cutlass::epilogue::TmaWarpSpecialized>,
      Fusion>::CollectiveOp;

  using Stock = typename cutlass::gemm::collective::CollectiveBuilder<
      Hopper, TensorOp, Type, RowMajor, kAlignment, Type, std::conditional_t<kDown, RowMajor, cutlass::layout::ColumnMajor>, kAlignment,
      float, Tile, Cluster, cutlass::gemm::collective::StageCountAutoCarveout<sizeof(typename Epilogue::SharedStorage)>,
      std::conditional_t<kTogether, cutlass::gemm::KernelTmaWarpSpecializedCooperative,
                         cutlass::gemm::KernelTmaWarpSpecializedPingpong>>::CollectiveOp;

  using Kernel = cutlass::gemm::kernel::GemmUniversal<Shape<int, int, int, int>, Mainloop<Stock, kDown>, Epilogue>;
  using Params = typename Kernel::Params;
  static_assert(Kernel::MaxThreadsPerBlock == kSm90Threads);

  static_assert(Kernel::SharedStorageSize == kTile.shared_memory);

  static Params params_of(const GemmTask& task, const GemmSm90Plan& plan, int sm_count) {
    typename Kernel::Arguments arguments{};
    arguments.mode = cutlass::gemm::GemmUniversalMode::kGemm;
    arguments.problem_shape = {static_cast<int>(task.rows), static_cast<int>(task.columns), depth_tiles(task).total * kDepthTile, 1};
    arguments.mainloop = {&task};
    arguments.epilogue.thread = {{task.column_scale, 1.0f}, {}, {static_cast<const Type*>(task.bias), Type(0)}, {}};
    arguments.epilogue.ptr_D = static_cast<Type*>(task.d);
    get<0>(arguments.epilogue.dD) = task.rows > 1 ? task.d_stride : peftops::round_up(task.columns, 8);
    arguments.hw_info.sm_count = sm_count;
    arguments.scheduler.max_swizzle_size = plan.swizzle;
    return Kernel::to_underlying_arguments(arguments, nullptr);
  }
};

template <class Element, bool kDown, int kCandidate>
__global__ void __launch_bounds__(kSm90Threads, 1) gemm(const __grid_constant__ typename Gemm<Element, kDown, kCandidate>::Params params) {
  extern __shared__ __align__(1024) unsigned char memory[];
  typename Gemm<Element, kDown, kCandidate>::Kernel()(params, reinterpret_cast<char*>(memory));
}

}  // namespace peftops::lora::sm90
