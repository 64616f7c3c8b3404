// The blocks: found by hash, and kept in the order in which they will be evicted.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <span>

#include "memory.h"

namespace switchgear {

using SequenceHash = std::uint64_t;
using BlockNumber = std::uint32_t;
using GenerationNumber = std::uint32_t;
using SetNumber = std::uint32_t;
using ModelNumber = std::uint32_t;

inline constexpr std::uint32_t kNone = UINT32_MAX;  // No block, set or generation.

// 28 bytes. The hash is in halves: as a whole it would have to begin at a multiple of eight.
struct Block {
    std::uint32_t hash_low, hash_high;
    SetNumber holders;  // kNone where there is no block.
    GenerationNumber generation;
    BlockNumber before, after;  // In the generation.
    BlockNumber next;           // In the bucket; of free places the next free one.

    SequenceHash hash() const { return std::uint64_t{hash_high} << 32 | hash_low; }
};

// Blocks in the order in which they came.
struct Generation {
    ModelNumber model;
    std::uint32_t blocks = 0;
    BlockNumber first = kNone, last = kNone;
};

// All models' blocks, in one array without order. Buckets chain those whose hashes fall together,
// generations those that are evicted together. Places of blocks that went are used again; when
// they become many, `tidy` fills them with the last blocks and gives the memory back.
class BlockTable {
public:
    BlockTable() { make_buckets(0); }

    std::uint32_t size() const { return static_cast<std::uint32_t>(blocks_.size()) - free_; }
    const Generation& generation(GenerationNumber number) const { return generations_[number]; }
    const Block& operator[](BlockNumber number) const { return blocks_[number]; }
    void set_holders(BlockNumber number, SetNumber holders) { blocks_[number].holders = holders; }

    GenerationNumber add_generation(ModelNumber model) {
        if (free_generations_.empty()) {
            generations_.push_back({model});
            return static_cast<GenerationNumber>(generations_.size() - 1);
        }
        GenerationNumber number = free_generations_.back();
        free_generations_.pop_back();
        generations_[number] = {model};
        return number;
    }

    // It must be empty.
    void drop_generation(GenerationNumber number) { free_generations_.push_back(number); }

    BlockNumber find(ModelNumber model, SequenceHash hash) const {
        BlockNumber number = buckets_[bucket(model, hash)];
        while (number != kNone) {
            const Block& block = blocks_[number];
            if (block.hash() == hash && generations_[block.generation].model == model) break;
            number = block.next;
        }
        return number;
    }

    // Calls `see` with each hash and its block. What it changes is seen by the ones after it.
    template <class See>
    void find_each(ModelNumber model, std::span<const SequenceHash> hashes, See&& see) const {
        constexpr std::size_t kAhead = 16;
        for (std::size_t position = 0; position < hashes.size(); ++position) {
            // Fetches memory while others are dealt with.
            if (position + kAhead < hashes.size())
                __builtin_prefetch(&buckets_[bucket(model, hashes[position + kAhead])]);
            see(hashes[position], find(model, hashes[position]));
        }
    }

    // A block that is not there yet, at the end of a generation.
    void append(GenerationNumber generation, SequenceHash hash, SetNumber holders) {
        if (size() == buckets_.size()) make_buckets(2 * buckets_.size());
        Block block{};
        block.hash_low = static_cast<std::uint32_t>(hash);
        block.hash_high = static_cast<std::uint32_t>(hash >> 32);
        block.holders = holders;
        block.generation = generation;
        BlockNumber number = first_free_;
        if (number == kNone) {
            number = static_cast<BlockNumber>(blocks_.size());
            blocks_.push(block);
        } else {
            first_free_ = blocks_[number].next;
            --free_;
            blocks_[number] = block;
        }
        put_in_bucket(number);
        link(number);
    }

    void erase(BlockNumber number) {
        unlink(number);
        named(number) = blocks_[number].next;
        blocks_[number].holders = kNone;
        blocks_[number].next = first_free_;
        first_free_ = number;
        ++free_;
    }

    void move(BlockNumber number, GenerationNumber to) {
        unlink(number);
        blocks_[number].generation = to;
        link(number);
    }

    // Gives memory back where much of it is free. Numbers of blocks change.
    void tidy() {
        if (free_ <= size() / 16 + kSpare) return;
        const std::uint32_t left = size();
        for (BlockNumber last = left; last < blocks_.size(); ++last) {
            if (blocks_[last].holders == kNone) continue;
            while (first_free_ >= left) first_free_ = blocks_[first_free_].next;
            const BlockNumber place = first_free_;
            first_free_ = blocks_[place].next;
            relocate(last, place);
        }
        first_free_ = kNone;
        free_ = 0;
        blocks_.truncate(left);
        const std::size_t fitting = std::bit_ceil(std::size_t{left} + left / 16);
        if (fitting < buckets_.size()) make_buckets(fitting);
    }

    // All blocks of all generations.
    void clear() {
        for (Generation& generation : generations_) generation = {generation.model};
        first_free_ = kNone;
        free_ = 0;
        blocks_.truncate(0);
        make_buckets(0);
    }

    // Calls `see` with every block's number; it may erase that block.
    template <class See>
    void each(See&& see) {
        for (BlockNumber number = 0; number < blocks_.size(); ++number)
            if (blocks_[number].holders != kNone) see(number);
    }

private:
    static constexpr std::uint32_t kSpare = 256;
    static constexpr std::size_t kLeastBuckets = 256;

    std::size_t bucket(ModelNumber model, SequenceHash hash) const {
        // Models that serve the same prompts have the same hashes.
        return ((hash ^ model * 0xC2B2'AE3D'27D4'EB4Full) * 0x9E37'79B9'7F4A'7C15ull) >> shift_;
    }

    // What names this block in its bucket.
    BlockNumber& named(BlockNumber number) {
        const Block& block = blocks_[number];
        BlockNumber* at = &buckets_[bucket(generations_[block.generation].model, block.hash())];
        while (*at != number) at = &blocks_[*at].next;
        return *at;
    }

    void put_in_bucket(BlockNumber number) {
        Block& block = blocks_[number];
        BlockNumber& head = buckets_[bucket(generations_[block.generation].model, block.hash())];
        block.next = head;
        head = number;
    }

    void make_buckets(std::size_t count) {
        count = std::max(count, kLeastBuckets);
        shift_ = 64 - std::countr_zero(count);
        Vector<BlockNumber>().swap(buckets_);  // Never both.
        buckets_.assign(count, kNone);
        each([this](BlockNumber number) { put_in_bucket(number); });
    }

    void link(BlockNumber number) {
        Block& block = blocks_[number];
        Generation& generation = generations_[block.generation];
        block.before = generation.last;
        block.after = kNone;
        (block.before == kNone ? generation.first : blocks_[block.before].after) = number;
        generation.last = number;
        ++generation.blocks;
    }

    void unlink(BlockNumber number) {
        const Block& block = blocks_[number];
        Generation& generation = generations_[block.generation];
        (block.before == kNone ? generation.first : blocks_[block.before].after) = block.after;
        (block.after == kNone ? generation.last : blocks_[block.after].before) = block.before;
        --generation.blocks;
    }

    void relocate(BlockNumber from, BlockNumber to) {
        named(from) = to;
        const Block& block = blocks_[to] = blocks_[from];
        Generation& generation = generations_[block.generation];
        (block.before == kNone ? generation.first : blocks_[block.before].after) = to;
        (block.after == kNone ? generation.last : blocks_[block.after].before) = to;
    }

    Array<Block> blocks_;
    BlockNumber first_free_ = kNone;
    std::uint32_t free_ = 0;
    Vector<BlockNumber> buckets_;  // The first block of each; as many as a power of two.
    int shift_ = 0;
    Vector<Generation> generations_;
    Vector<GenerationNumber> free_generations_;
};

}  // namespace switchgear
