// Sets of holders: who holds some blocks, and in which tiers. Each set exists once for its model,
// and blocks name it by number.
#pragma once

#include <array>
#include <bit>
#include <memory>
#include <unordered_map>

#include "block_table.h"

namespace switchgear {

inline constexpr std::size_t kTiers = 3;

using Tier = std::size_t;            // 0 is the device, then host and disk.
using WorkerNumber = std::uint32_t;  // Within a model.

// A bit for each worker and tier. Words go by threes: 64 workers in one tier each. The last three
// are never all zero, so equal masks have equal words.
class Masks {
public:
    std::size_t groups() const { return words_.size() / kTiers; }  // Of 64 workers.
    bool is_empty() const { return words_.empty(); }

    // In this tier.
    bool has(WorkerNumber worker, Tier tier) const {
        const std::size_t word = worker / 64 * kTiers + tier;
        return word < words_.size() && words_[word] >> worker % 64 & 1;
    }

    // In any tier.
    bool has(WorkerNumber worker) const {
        return reach(worker / 64, kTiers - 1) >> worker % 64 & 1;
    }

    // The workers of a group that are in this tier or in a faster one.
    std::uint64_t reach(std::size_t group, Tier slowest) const {
        if (group >= groups()) return 0;
        std::uint64_t workers = 0;
        for (Tier tier = 0; tier <= slowest; ++tier) workers |= words_[group * kTiers + tier];
        return workers;
    }

    // The workers of a group that are in this tier.
    std::uint64_t in_tier(std::size_t group, Tier tier) const {
        return words_[group * kTiers + tier];
    }

    void toggle(WorkerNumber worker, Tier tier) {
        const std::size_t group = worker / 64;
        if (group >= groups()) words_.resize((group + 1) * kTiers);
        words_[group * kTiers + tier] ^= std::uint64_t{1} << worker % 64;
        trim();
    }

    void remove(WorkerNumber worker) {
        for (Tier tier = 0; tier < kTiers; ++tier)
            if (has(worker, tier)) words_[worker / 64 * kTiers + tier] ^= std::uint64_t{1} << worker % 64;
        trim();
    }

    // The one worker that is in, in whatever tiers; kNone when there are others.
    WorkerNumber only() const {
        WorkerNumber found = kNone;
        for (std::size_t group = 0; group < groups(); ++group) {
            const std::uint64_t workers = reach(group, kTiers - 1);
            if (workers == 0) continue;
            if (found != kNone || !std::has_single_bit(workers)) return kNone;
            found = static_cast<WorkerNumber>(group * 64 + std::countr_zero(workers));
        }
        return found;
    }

    std::size_t hash() const {
        std::uint64_t mixed = words_.size();
        for (const std::uint64_t word : words_)
            mixed = std::rotl((mixed ^ word) * 0x9E37'79B9'7F4A'7C15ull, 29);
        return mixed;
    }

    bool operator==(const Masks& other) const = default;

private:
    void trim() {
        while (!words_.empty() && reach(groups() - 1, kTiers - 1) == 0)
            words_.resize(words_.size() - kTiers);
        if (words_.capacity() > 2 * words_.size()) words_.shrink_to_fit();
    }

    Vector<std::uint64_t> words_;
};

// Calls `see` with each worker of a group.
template <class See>
void each_worker(std::size_t group, std::uint64_t workers, See&& see) {
    for (; workers != 0; workers &= workers - 1)
        see(static_cast<WorkerNumber>(group * 64 + std::countr_zero(workers)));
}

struct Holders;

// Sets in the order in which they came.
struct SetList {
    Holders *first = nullptr, *last = nullptr;
};

struct Holders {
    Masks masks;  // Empty once the last one has left.
    std::uint32_t blocks = 0;
    // Where in a prompt others followed when that was last looked for, and so a guess for the next
    // time; 0 when it never was.
    std::uint32_t end = 0;
    SetNumber number = kNone;
    ModelNumber model = kNone;
    SetList* list = nullptr;  // The one that it is in; none once the last one has left.
    Holders *before = nullptr, *after = nullptr;

    bool is_held() const { return !masks.is_empty(); }

    void join(SetList& joined) {
        list = &joined;
        before = joined.last;
        after = nullptr;
        (before == nullptr ? joined.first : before->after) = this;
        joined.last = this;
    }

    void leave_list() {
        (before == nullptr ? list->first : before->after) = after;
        (after == nullptr ? list->last : after->before) = before;
        list = nullptr;
    }
};

// All models' sets, by number.
class HoldersTable {
public:
    HoldersTable() = default;
    HoldersTable(const HoldersTable&) = delete;
    HoldersTable& operator=(const HoldersTable&) = delete;
    ~HoldersTable() {
        for (Holders* each : sets_) destroy(each);
    }

    Holders& operator[](SetNumber number) const { return *sets_[number]; }

    Holders& add(const Masks& masks, ModelNumber model) {
        Holders* made = new (resized(nullptr, sizeof(Holders))) Holders;
        made->masks = masks;
        made->model = model;
        if (free_.empty()) {
            made->number = static_cast<SetNumber>(sets_.size());
            sets_.push_back(made);
        } else {
            made->number = free_.back();
            free_.pop_back();
            sets_[made->number] = made;
        }
        return *made;
    }

    void remove(Holders& gone) {
        sets_[gone.number] = nullptr;
        free_.push_back(gone.number);
        destroy(&gone);
    }

    // Calls `see` with every set; it may remove that set.
    template <class See>
    void each(See&& see) {
        for (std::size_t number = 0; number < sets_.size(); ++number)
            if (sets_[number] != nullptr) see(*sets_[number]);
    }

private:
    static void destroy(Holders* set) {
        if (set == nullptr) return;
        set->~Holders();
        PyMem_RawFree(set);
    }

    Vector<Holders*> sets_;
    Vector<SetNumber> free_;
};

struct MasksHash {
    std::size_t operator()(const Masks* masks) const { return masks->hash(); }
};

struct MasksEqual {
    bool operator()(const Masks* one, const Masks* other) const { return *one == *other; }
};

// One model's sets by their masks, to be shared.
using KnownSets = std::unordered_map<
    const Masks*, Holders*, MasksHash, MasksEqual, Traced<std::pair<const Masks* const, Holders*>>>;

}  // namespace switchgear
