// csrc/gram_ptx.h for a CPU: gram_cuda.cu runs as it stands, a thread of its own for every thread of a cluster.
// Copies land when they are issued, products are taken only when they must be done: the order least kind to a mistake.
#pragma once
#include <pthread.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <vector>

#include "gram_cuda.h"

#define __device__
#define __global__
#define __grid_constant__
#define __cluster_dims__(...)
#define __launch_bounds__(...)

struct int2 {
    int x, y;
};
struct double2 {
    double x, y;
};
struct CUtensorMap {
    const uint16_t* y;
    emocore::gram_cuda::Map form;
};
struct Index {
    unsigned x;
};

namespace emocore::gram_cuda {
namespace {

using std::min;

[[noreturn]] void fail(const char* what) {
    std::fprintf(stderr, "emulation: %s\n", what);
    std::fflush(stderr);
    std::_Exit(9);
}

thread_local Index threadIdx, blockIdx, gridDim;
int __shfl_sync(unsigned, int value, int) { return value; }  // asked only for what a warp agrees on
float __fadd_rn(float a, float b) { return a + b; }
float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
double __hiloint2double(int high, int low) {
    const uint64_t bits = static_cast<uint64_t>(static_cast<uint32_t>(high)) << 32 | static_cast<uint32_t>(low);
    double value;
    std::memcpy(&value, &bits, 8);
    return value;
}

// --- the cluster

struct Barrier {
    int count = 0, missing = 0, bytes = 0;
    unsigned phase = 0;
};

constexpr uint32_t START = 0x410;  // of dynamic shared memory: only 16-byte aligned

struct Warp {
    Warp() { pthread_barrier_init(&together, nullptr, 32); }
    pthread_barrier_t together;
};

struct Block {
    Warp warps[THREADS / 32];
    std::vector<uint16_t> memory = std::vector<uint16_t>((START + SHARED_BYTES) / 2, 0x7e00);  // NaN
    std::vector<Barrier> barriers = std::vector<Barrier>((START + SHARED_BYTES) / 8);
};

struct Cluster {
    Block blocks[CLUSTER];
    std::mutex mutex;
    std::condition_variable changed;
    int arrived = 0, round = 0;

    template <class F>
    void until(std::unique_lock<std::mutex>& lock, F&& ready) {
        if (!changed.wait_for(lock, std::chrono::seconds(20), ready)) fail("deadlock");
    }

    Barrier& barrier(int rank, uint32_t address) {
        if (address % 8 || address + 8 > START + SHARED_BYTES) fail("a barrier outside of shared memory");
        return blocks[rank].barriers[address / 8];
    }

    void advance(Barrier& b, int arrivals, int bytes) {
        b.missing -= arrivals;
        b.bytes += bytes;
        if (b.missing < 0) fail("more arrivals than a barrier expects");
        if (b.missing || b.bytes) return;
        ++b.phase;
        b.missing = b.count;
        changed.notify_all();
    }
};

thread_local Cluster* cluster;
thread_local int rank_;

void __syncwarp() { pthread_barrier_wait(&cluster->blocks[rank_].warps[threadIdx.x / 32].together); }

uint32_t shared_memory() { return START; }
int cluster_rank() { return rank_; }

void cluster_sync() {
    std::unique_lock lock(cluster->mutex);
    const int round = cluster->round;
    if (++cluster->arrived == CLUSTER * THREADS) {
        cluster->arrived = 0;
        ++cluster->round;
        cluster->changed.notify_all();
    }
    cluster->until(lock, [&] { return cluster->round != round; });
}

template <int COUNT>
void give_registers() {}
template <int COUNT>
void take_registers() {}

// --- mbarriers

void init(uint32_t address, int count) { cluster->barrier(rank_, address) = {count, count, 0, 0}; }
void publish_barriers() {}

void wait(uint32_t address, uint32_t parity) {
    std::unique_lock lock(cluster->mutex);
    const Barrier& b = cluster->barrier(rank_, address);
    cluster->until(lock, [&] { return b.phase % 2 != parity; });
}

void expect(uint32_t address, uint32_t bytes) {
    std::lock_guard lock(cluster->mutex);
    cluster->advance(cluster->barrier(rank_, address), 1, static_cast<int>(bytes));
}

void arrive(uint32_t address, int rank) {
    std::lock_guard lock(cluster->mutex);
    cluster->advance(cluster->barrier(rank, address), 1, 0);
}

// --- copies

void load(const CUtensorMap* map, const Box& box, uint32_t to, uint32_t barrier) {
    const Map& form = map->form;
    if (to % 1024 || to + BOX_BYTES > START + SHARED_BYTES) fail("a box outside of shared memory");
    std::lock_guard lock(cluster->mutex);
    for (int rank = 0; rank < CLUSTER; ++rank) {
        if (!box.both && rank != rank_) continue;
        for (uint32_t r = 0; r < form.box[1]; ++r)
            for (uint32_t c = 0; c < form.box[0]; ++c) {
                const uint64_t column = box.column + c, row = box.row + r, slice = box.slice;
                const bool inside = column < form.sizes[0] && row < form.sizes[1] && slice < form.sizes[2];
                const uint64_t at = column + (row * form.strides[0] + slice * form.strides[1]) / 2;
                const uint32_t word = to / 2 + r * 64 + (c / 8 ^ r % 8) * 8 + c % 8;
                cluster->blocks[rank].memory[word] = inside ? map->y[at] : 0;
            }
        cluster->advance(cluster->barrier(rank, barrier), 0, -BOX_BYTES);
    }
}

thread_local std::pair<const double*, const double*> state;  // its bounds

template <int BYTES>
void prefetch(const void* from) {
    const auto* first = static_cast<const double*>(from);
    if (first < state.first || first + BYTES / 8 > state.second) fail("a prefetch outside of the state");
}

// --- wgmma

struct Product {
    uint64_t left, right;
    bool add;
};
thread_local std::vector<std::vector<Product>> groups;
thread_local float* pending;

float widened(uint16_t half) {
    const int exponent = half >> 10 & 31, fraction = half & 1023;
    const int digits = exponent ? 1024 + fraction : fraction;
    const float size = exponent == 31 ? NAN : std::ldexp(static_cast<float>(digits), std::max(exponent, 1) - 25);
    return half >> 15 ? -size : size;
}

// Row k, column n of an operand whose columns lie side by side, under the 128-byte swizzle of the PTX manual.
float element(uint64_t descriptor, int k, int n) {
    if (descriptor >> 62 != 1 || (descriptor >> 49 & 7) != 0) fail("not the 128-byte swizzle from its start");
    const auto field = [&](int bit) { return static_cast<uint32_t>(descriptor >> bit & 0x3fff) << 4; };
    const uint32_t address = field(0) + n / 64 * field(16) + k / 8 * field(32) + k % 8 * 128 + n % 64 * 2;
    return widened(cluster->blocks[rank_].memory[(address ^ (address >> 7 & 7) << 4) / 2]);
}

// PTX's fragment of D: a warp has 16 rows, a lane two of them, 8 apart, and in each two columns of every 8.
void take(float* sums, const Product& product) {
    const int lane = threadIdx.x % 32, row = threadIdx.x % 128 / 32 * 16 + lane / 4;
    if (!product.add) std::fill_n(sums, SUMS, 0.0f);
    for (int k = 0; k < MMA_DEPTH; ++k) {
        const float upper = element(product.left, k, row), lower = element(product.left, k, row + 8);
        for (int pair = 0; pair < WIDTH / 8; ++pair)
            for (int odd = 0; odd < 2; ++odd) {
                const float right = element(product.right, k, 8 * pair + lane % 4 * 2 + odd);
                sums[4 * pair + odd] += upper * right;
                sums[4 * pair + 2 + odd] += lower * right;
            }
    }
}

void open_group() {
    __syncwarp();  // as all of wgmma does
    groups.emplace_back();
}

void multiply(float (&sums)[SUMS], uint64_t left, uint64_t right, bool add) {
    pending = sums;
    groups.back().push_back({left, right, add});
}

void close_group() {}

template <int PENDING>
void settle() {
    while (groups.size() > PENDING) {
        for (const Product& product : groups.front()) take(pending, product);
        groups.erase(groups.begin());
    }
    __syncwarp();
}

void pin(float (&)[SUMS]) {
    if (!groups.empty()) fail("sums are read while they are taken");
}

}  // namespace
}  // namespace emocore::gram_cuda
