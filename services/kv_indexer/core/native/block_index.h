// Which workers hold which KV blocks. Answers, evicts and counts as python_index.py does, which has
// the theory of operation. What differs is how it is kept: blocks of all models and generations in
// one BlockTable, each with the number of its set of holders. A block changes hands by changing that
// number, so nothing is done by runs of blocks here.
#pragma once

#include <deque>
#include <map>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#include "holders.h"

namespace switchgear {

using InstanceId = std::uint64_t;

// Of memory for a block: 28 for itself, up to 9 to spare, and 4 to 9 for buckets.
inline constexpr std::uint64_t kBlockBytes = 48;

// Of memory for a set of holders of up to 64 workers, and for each 64 more.
inline constexpr std::uint64_t kHoldersBytes = 256, kGroupBytes = 8 * kTiers;

inline constexpr std::uint64_t kGenerations = 4;  // Of a full index, or a few more.

// What is kept contradicts itself. The text says where.
struct Contradiction : std::logic_error {
    using std::logic_error::logic_error;
};

struct Model;

// One worker's share of the index. Blocks count once for each tier.
struct Worker {
    Model* model;
    WorkerNumber number;
    void* name;  // The caller's.
    std::uint64_t held = 0, evicted = 0;
    SetList own{};  // Sets that have blocks and nobody else is in.
};

// What is held of one model, at one block size.
struct Model {
    ModelNumber number;
    std::deque<GenerationNumber> generations;  // Oldest first.
    std::int64_t born = 0;                     // The turn that the newest began in.
    SetList shared;                            // All sets that have blocks and more than one worker.
    KnownSets known;  // A worker that goes may make sets equal, so not all are here.
    std::vector<Worker*> workers;  // By number; null for those that left.
    std::vector<WorkerNumber> free_numbers;
    std::size_t live_workers = 0;
    bool has_lower_tiers = false;  // Whether anything was ever stored below the device.
};

class BlockIndex {
public:
    using ModelKey = std::pair<std::string, long>;  // With the block size in tokens.

    explicit BlockIndex(std::uint64_t max_bytes)
        // Blocks have numbers of 32 bits.
        : max_bytes_(std::min(max_bytes, kBlockBytes * (kNone - 1))) {}

    std::uint64_t blocks() const { return held_; }
    std::uint64_t evicted() const { return evicted_; }
    std::uint64_t used_bytes() const { return table_.size() * kBlockBytes + holders_bytes_; }

    Worker* worker(InstanceId instance) {
        const auto found = workers_.find(instance);
        return found == workers_.end() ? nullptr : &found->second;
    }

    const Model* model(const ModelKey& key) const {
        const auto found = model_keys_.find(key);
        return found == model_keys_.end() ? nullptr : found->second;
    }

    // Adds a worker that is not in the index.
    void add(InstanceId instance, const ModelKey& key, void* name) {
        Model*& model = model_keys_[key];
        if (model == nullptr) {
            models_.push_back(std::make_unique<Model>());
            model = models_.back().get();
            model->number = next_model_++;
            model->generations.push_back(table_.add_generation(model->number));
        }
        WorkerNumber number = static_cast<WorkerNumber>(model->workers.size());
        if (model->free_numbers.empty()) {
            model->workers.push_back(nullptr);
        } else {
            number = model->free_numbers.back();
            model->free_numbers.pop_back();
        }
        Worker& added = workers_.emplace(instance, Worker{model, number, name}).first->second;
        model->workers[number] = &added;
        ++model->live_workers;
    }

    // Forgets a worker and what it holds, and its model with the model's last worker.
    void remove(InstanceId instance) {
        Worker& gone = workers_.at(instance);
        Model& model = *gone.model;
        if (model.live_workers == 1) {
            forget_model(gone);
        } else {
            clear(gone);
            model.workers[gone.number] = nullptr;
            model.free_numbers.push_back(gone.number);
            --model.live_workers;
        }
        workers_.erase(instance);
    }

    // Blocks in a row, the first of which follows `before`, or starts a prompt.
    void store_chain(Worker& worker, std::span<const SequenceHash> hashes,
                     std::optional<SequenceHash> before, Tier tier) {
        Model& model = *worker.model;
        model.has_lower_tiers |= tier != 0;
        if (hashes.empty()) return;
        GenerationNumber generation;
        if (before) {
            const BlockNumber number = table_.find(model.number, *before);
            if (number == kNone || !holders_of(number).masks.has(worker.number)) {
                worker.evicted += hashes.size();
                evicted_ += hashes.size();
                return;
            }
            generation = table_[number].generation;
        } else {
            generation = newest(model);
        }
        std::uint64_t added = 0;
        SetNumber alone = kNone;  // The set of this worker in this tier alone.
        Change change;
        table_.find_each(model.number, hashes, [&](SequenceHash hash, BlockNumber number) {
            if (number != kNone) {
                Holders& holders = holders_of(number);
                if (holders.is_held()) {
                    generation = table_[number].generation;
                    if (holders.masks.has(worker.number, tier)) return;
                    pass_on(worker, number, tier, change);
                    ++worker.held;
                    ++held_;
                    return;
                }
                // Left by its last holder. It is new again, and belongs at the end.
                erase(number);
            }
            if (alone == kNone) {
                Masks masks;
                masks.toggle(worker.number, tier);
                alone = set_of(model, masks, 0).number;
            }
            table_.append(generation, hash, alone);
            ++sets_[alone].blocks;
            ++added;
        });
        worker.held += added;
        held_ += added;
        count_turn(added);
        make_room();
    }

    // Removes blocks from a tier. Those not held there change nothing, or were evicted and are no
    // longer counted as such.
    void discard(Worker& worker, std::span<const SequenceHash> hashes, Tier tier) {
        const Model& model = *worker.model;
        Change change;
        table_.find_each(model.number, hashes, [&](SequenceHash, BlockNumber number) {
            if (number == kNone || !holders_of(number).masks.has(worker.number, tier)) {
                worker.evicted -= worker.evicted > 0;
                return;
            }
            pass_on(worker, number, tier, change);
            --worker.held;
            --held_;
        });
        table_.tidy();
        // Blocks that others still hold may need a set of holders that was not there.
        make_room();
    }

    // Removes all of a worker's blocks, those evicted included.
    void clear(Worker& worker) {
        held_ -= worker.held;
        worker.held = worker.evicted = 0;
        clear_list(worker, worker.own);
        clear_list(worker, worker.model->shared);
        if (8 * std::uint64_t{abandoned_} > 7 * std::uint64_t{table_.size()}) drop_abandoned();
    }

    // Calls `answer` with each worker's name and how many leading blocks of the prompt it holds in
    // this tier or in a faster one, if any; by increasing depth. `prompt` is read by position, a few
    // times for each different depth.
    template <class Prompt, class Answer>
    void overlap(const ModelKey& key, Prompt&& prompt, std::uint32_t prompt_blocks, Tier slowest,
                 Answer&& answer) {
        const auto found = model_keys_.find(key);
        if (found == model_keys_.end() || prompt_blocks == 0) return;
        Model& model = *found->second;
        const auto look = [&](std::uint32_t position) {
            const BlockNumber number = table_.find(model.number, prompt(position));
            return number == kNone ? kNone : table_[number].holders;
        };
        SetNumber holders = look(0);
        if (holders == kNone || !sets_[holders].is_held()) return;
        std::vector<std::uint64_t> holding(sets_[holders].masks.groups());
        bool is_anybody_left = false;
        for (std::size_t group = 0; group < holding.size(); ++group) {
            holding[group] = sets_[holders].masks.reach(group, slowest);
            is_anybody_left |= holding[group] != 0;
        }
        std::uint32_t deepest = 0, low = 0;
        // Holders further on that were seen already, nearest last. Past the end nobody is one.
        std::vector<std::pair<std::uint32_t, SetNumber>> ahead{{prompt_blocks, kNone}};
        if (const SetNumber last = look(prompt_blocks - 1); last != kNone)
            ahead.emplace_back(prompt_blocks - 1, last);
        while (is_anybody_left) {
            // `holders` hold block `low`. Where do others begin, and who? Mostly at the same block
            // as for the last prompt: then two looks tell.
            const std::uint32_t guess = sets_[holders].end;
            std::uint32_t high;
            SetNumber following;
            if (low < guess && guess < ahead.back().first &&
                (low == guess - 1 || look(guess - 1) == holders) &&
                (following = look(guess)) != holders) {
                high = guess;
            } else {
                std::tie(high, following) = ahead.back();
                ahead.pop_back();
                while (high - low > 1) {
                    const std::uint32_t middle = low + (high - low) / 2;
                    const SetNumber between = look(middle);
                    if (between == holders) {
                        low = middle;
                        continue;
                    }
                    if (between != following) {
                        ahead.emplace_back(high, following);
                        following = between;
                    }
                    high = middle;
                }
                sets_[holders].end = high;
            }
            low = high;
            if (following == holders) continue;
            is_anybody_left = false;
            for (std::size_t group = 0; group < holding.size(); ++group) {
                // A worker that breaks its promise may appear late: it does not count.
                const std::uint64_t staying =
                    following == kNone
                        ? 0
                        : holding[group] & sets_[following].masks.reach(group, slowest);
                each_worker(group, holding[group] ^ staying, [&](WorkerNumber leaving) {
                    answer(model.workers[leaving]->name, high);
                    deepest = high;
                });
                holding[group] = staying;
                is_anybody_left |= staying != 0;
            }
            holders = following;
        }
        if (model.generations.size() > 1 || model.born != turn_) renew(model, prompt, deepest);
    }

    // Calls `see` with each block that a worker holds in a tier.
    template <class See>
    void each_held(const Worker& worker, Tier tier, See&& see) {
        table_.each([&](BlockNumber number) {
            const Holders& holders = holders_of(number);
            if (holders.model == worker.model->number && holders.masks.has(worker.number, tier))
                see(table_[number].hash());
        });
    }

    // Calls `see` with each worker's name.
    template <class See>
    void each_name(See&& see) {
        for (const auto& [instance, worker] : workers_) see(worker.name);
    }

    // For tests: throws Contradiction when what is kept contradicts itself.
    void check_invariants() {
        const auto require = [](bool is_true, const char* what) {
            if (!is_true) throw Contradiction(what);
        };
        require(used_bytes() <= max_bytes_ || table_.size() == 0, "more memory than there may be");
        std::unordered_map<const Holders*, std::uint32_t> blocks;
        std::uint32_t abandoned = 0, generations_blocks = 0;
        table_.each([&](BlockNumber number) {
            const Holders& holders = holders_of(number);
            const Block& block = table_[number];
            ++blocks[&holders];
            abandoned += !holders.is_held();
            require(table_.generation(block.generation).model == holders.model, "another model's");
            require(table_.find(holders.model, block.hash()) == number, "in two places");
        });
        for (const auto& model : models_) {
            require(model->live_workers != 0, "a model without workers");
            for (const GenerationNumber number : model->generations) {
                const Generation& generation = table_.generation(number);
                require(generation.model == model->number, "a generation of another model");
                std::uint32_t in_order = 0;
                for (BlockNumber each = generation.first, before = kNone; each != kNone;
                     before = each, each = table_[each].after, ++in_order) {
                    require(table_[each].generation == number, "in another generation");
                    require(table_[each].before == before, "in another order backwards");
                }
                require(in_order == generation.blocks, "a generation's blocks");
                generations_blocks += in_order;
            }
            for (const auto& [masks, holders] : model->known)
                require(*masks == holders->masks && holders->is_held(), "known by other masks");
        }
        require(generations_blocks == table_.size(), "blocks of no generation");
        std::unordered_map<const Worker*, std::uint64_t> held;
        std::uint64_t held_by_all = 0, holders_bytes = 0;
        sets_.each([&](const Holders& holders) {
            const Model& model = model_of(holders);
            require(holders.blocks == blocks[&holders] && holders.blocks != 0, "a set's blocks");
            require(holders.is_held() == (holders.list != nullptr), "a set's list");
            if (!holders.is_held()) return;
            const WorkerNumber only = holders.masks.only();
            require(holders.list == (only == kNone ? &model.shared : &model.workers[only]->own),
                    "a set in another list");
            holders_bytes += memory_bytes(holders);
            for (std::size_t group = 0; group < holders.masks.groups(); ++group)
                for (Tier tier = 0; tier < kTiers; ++tier)
                    each_worker(group, holders.masks.in_tier(group, tier), [&](WorkerNumber each) {
                        require(model.workers[each] != nullptr, "held by nobody");
                        held[model.workers[each]] += holders.blocks;
                        held_by_all += holders.blocks;
                    });
        });
        require(abandoned == abandoned_, "blocks that nobody holds");
        require(holders_bytes == holders_bytes_, "memory of sets");
        require(held_by_all == held_, "blocks held");
        for (const auto& [instance, worker] : workers_)
            require(worker.held == held[&worker], "a worker's blocks");
    }

private:
    // What became of the last block that was passed on, for the next one with the same holders.
    struct Change {
        SetNumber from = kNone;
        SetNumber to = kNone;  // None when nobody is left.
    };

    Holders& holders_of(BlockNumber number) const { return sets_[table_[number].holders]; }

    // Adds a worker to the holders of a block, or takes it from them; the last one takes the block
    // along.
    void pass_on(Worker& worker, BlockNumber number, Tier tier, Change& change) {
        Holders& before = holders_of(number);
        if (before.number != change.from) {
            Masks masks = before.masks;
            masks.toggle(worker.number, tier);
            change.from = before.number;
            change.to = masks.is_empty() ? kNone : set_of(*worker.model, masks, before.end).number;
        }
        if (before.blocks == 1) change.from = kNone;  // The set goes, and its number with it.
        if (change.to == kNone) {
            erase(number);
        } else {
            table_.set_holders(number, change.to);
            ++sets_[change.to].blocks;
            take_from(before, 1);
        }
    }

    void erase(BlockNumber number) {
        Holders& holders = holders_of(number);
        table_.erase(number);
        take_from(holders, 1);
    }

    // So many of a set's blocks are not its own any more.
    void take_from(Holders& holders, std::uint32_t blocks) {
        holders.blocks -= blocks;
        if (!holders.is_held()) abandoned_ -= blocks;
        if (holders.blocks != 0) return;
        if (holders.is_held()) forget_set(holders);
        sets_.remove(holders);
    }

    // The set with these masks; `end` is what it guesses when it is new.
    Holders& set_of(Model& model, const Masks& masks, std::uint32_t end) {
        if (const auto found = model.known.find(&masks); found != model.known.end())
            return *found->second;
        Holders& made = sets_.add(masks, model.number);
        made.end = end;
        know_set(model, made);
        return made;
    }

    static std::uint64_t memory_bytes(const Holders& holders) {
        return kHoldersBytes + kGroupBytes * (holders.masks.groups() - 1);
    }

    void know_set(Model& model, Holders& holders) {
        const WorkerNumber only = holders.masks.only();
        holders.join(only == kNone ? model.shared : model.workers[only]->own);
        model.known.try_emplace(&holders.masks, &holders);
        holders_bytes_ += memory_bytes(holders);
    }

    void forget_set(Holders& holders) {
        Model& model = model_of(holders);
        holders.leave_list();
        const auto known = model.known.find(&holders.masks);
        if (known != model.known.end() && known->second == &holders) model.known.erase(known);
        holders_bytes_ -= memory_bytes(holders);
    }

    Model& model_of(const Holders& holders) const {
        // They are few, and numbers ascend.
        const auto found = std::lower_bound(
            models_.begin(), models_.end(), holders.model,
            [](const auto& model, ModelNumber number) { return model->number < number; });
        return **found;
    }

    // Takes a worker out of the sets of a list.
    void clear_list(Worker& worker, SetList& list) {
        Holders* const end = list.last;
        for (Holders *set = list.first, *next; set != nullptr; set = next) {
            next = set == end ? nullptr : set->after;  // What comes after that was just put there.
            if (!set->masks.has(worker.number)) continue;
            forget_set(*set);
            set->masks.remove(worker.number);
            if (set->is_held())
                know_set(*worker.model, *set);
            else
                abandoned_ += set->blocks;
        }
    }

    void forget_model(Worker& last) {
        Model& model = *last.model;
        held_ -= last.held;
        std::uint32_t blocks = 0;
        for (const GenerationNumber generation : model.generations)
            blocks += table_.generation(generation).blocks;
        sets_.each([&](Holders& holders) {
            if (holders.model != model.number) return;
            if (holders.is_held())
                forget_set(holders);
            else
                abandoned_ -= holders.blocks;
            sets_.remove(holders);
        });
        if (blocks == table_.size()) {
            table_.clear();
        } else {
            for (const GenerationNumber generation : model.generations)
                while (table_.generation(generation).blocks != 0)
                    table_.erase(table_.generation(generation).last);
            table_.tidy();
        }
        for (const GenerationNumber generation : model.generations)
            table_.drop_generation(generation);
        std::erase_if(model_keys_, [&](const auto& entry) { return entry.second == &model; });
        std::erase_if(models_, [&](const auto& each) { return each.get() == &model; });
    }

    // Moves what was matched to the newest generation.
    template <class Prompt>
    void renew(Model& model, Prompt&& prompt, std::uint32_t matched_blocks) {
        const GenerationNumber to = newest(model);
        const auto is_there = [&](BlockNumber number) {
            return number != kNone && table_[number].generation == to;
        };
        if (matched_blocks == 0) return;
        if (is_there(table_.find(model.number, prompt(matched_blocks - 1)))) return;
        std::uint64_t moved = 0;
        for (std::uint32_t position = 0; position < matched_blocks; ++position) {
            const BlockNumber number = table_.find(model.number, prompt(position));
            if (number == kNone || is_there(number)) continue;
            table_.move(number, to);
            ++moved;
        }
        count_turn(moved);
    }

    // The generation of this turn.
    GenerationNumber newest(Model& model) {
        auto& generations = model.generations;
        if (model.born != turn_) {
            model.born = turn_;
            std::erase_if(generations, [this](GenerationNumber number) {
                const bool is_empty = table_.generation(number).blocks == 0;
                if (is_empty) table_.drop_generation(number);
                return is_empty;
            });
            if (generations.size() > 2 * kGenerations) {
                // What was the oldest is still evicted first.
                const GenerationNumber oldest = generations.front();
                generations.pop_front();
                while (table_.generation(oldest).blocks != 0)
                    table_.move(table_.generation(oldest).first, generations.front());
                table_.drop_generation(oldest);
            }
            generations.push_back(table_.add_generation(model.number));
        }
        return generations.back();
    }

    // Goes on to the next turn when it is time. In a roomy index it never is.
    void count_turn(std::uint64_t blocks) {
        turn_blocks_ += blocks;
        if (turn_blocks_ * kBlockBytes * kGenerations <= max_bytes_) return;
        turn_blocks_ = 0;
        if (2 * used_bytes() > max_bytes_) ++turn_;
    }

    // Evicts until what is left fits.
    void make_room() {
        while (used_bytes() > max_bytes_ && table_.size() != 0) {
            if (4 * std::uint64_t{abandoned_} > table_.size()) {
                drop_abandoned();
                continue;
            }
            Model& model = least_recent();
            const GenerationNumber oldest = model.generations.front();
            if (table_.generation(oldest).blocks == 0) {
                table_.drop_generation(oldest);
                model.generations.pop_front();
                continue;
            }
            const std::uint64_t excess_bytes = used_bytes() - max_bytes_;
            const std::uint64_t excess_blocks = (excess_bytes + kBlockBytes - 1) / kBlockBytes;
            for (std::uint64_t left =
                     std::min<std::uint64_t>(excess_blocks, table_.generation(oldest).blocks);
                 left != 0; --left)
                evict(model, table_.generation(oldest).last);
            table_.tidy();
        }
    }

    void evict(Model& model, BlockNumber number) {
        const Masks& masks = holders_of(number).masks;
        for (std::size_t group = 0; group < masks.groups(); ++group)
            for (Tier tier = 0; tier < kTiers; ++tier)
                each_worker(group, masks.in_tier(group, tier), [&](WorkerNumber holder) {
                    --model.workers[holder]->held;
                    ++model.workers[holder]->evicted;
                    --held_;
                    ++evicted_;
                });
        erase(number);
    }

    // The model whose oldest generation is from before the others'.
    Model& least_recent() const {
        Model* found = nullptr;
        std::int64_t found_from = 0;
        for (const auto& model : models_) {
            const auto& generations = model->generations;
            if (std::ranges::none_of(generations, [this](GenerationNumber number) {
                    return table_.generation(number).blocks != 0;
                }))
                continue;
            const std::int64_t from = model->born - static_cast<std::int64_t>(generations.size());
            if (found == nullptr || from < found_from) {
                found = model.get();
                found_from = from;
            }
        }
        return *found;
    }

    void drop_abandoned() {
        table_.each([this](BlockNumber number) {
            if (!holders_of(number).is_held()) erase(number);
        });
        table_.tidy();
    }

    std::uint64_t max_bytes_;
    BlockTable table_;
    HoldersTable sets_;
    std::unordered_map<InstanceId, Worker> workers_;
    std::vector<std::unique_ptr<Model>> models_;  // In the order in which they came.
    std::map<ModelKey, Model*> model_keys_;
    ModelNumber next_model_ = 0;
    std::uint64_t holders_bytes_ = 0;
    std::uint32_t abandoned_ = 0;  // Blocks whose last holder went.
    std::int64_t turn_ = 0;        // In each of them models begin a generation, when they need one.
    std::uint64_t turn_blocks_ = 0;  // Blocks that were new or were renewed in this turn.
    std::uint64_t held_ = 0, evicted_ = 0;
};

}  // namespace switchgear
