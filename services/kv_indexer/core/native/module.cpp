// The Python module `switchgear_block_index`: BlockIndex of services/kv_indexer/core/index.py, on top
// of block_index.h. Built by build.sh (`make env`) with a C++ compiler alone.
#include <array>
#include <string_view>

#include "block_index.h"

namespace switchgear {
namespace {

// Python has been told what is wrong.
struct PythonError {};

// A reference of our own.
class Reference {
public:
    explicit Reference(PyObject* object) : object_(object) {
        if (object == nullptr) throw PythonError();
    }
    Reference(const Reference&) = delete;
    Reference& operator=(const Reference&) = delete;
    ~Reference() { Py_XDECREF(object_); }

    PyObject* get() const { return object_; }
    PyObject* release() { return std::exchange(object_, nullptr); }

private:
    PyObject* object_;
};

// Of numbers that are larger the lower 64 bits. Unlike a function that refuses those this one takes
// no longer than finding the block.
SequenceHash as_hash(PyObject* number) {
    const SequenceHash hash = PyLong_AsUnsignedLongLongMask(number);
    if (hash == UINT64_MAX && PyErr_Occurred()) throw PythonError();
    return hash;
}

std::uint64_t as_unsigned(PyObject* number) {
    const std::uint64_t value = PyLong_AsUnsignedLongLong(number);
    if (value == UINT64_MAX && PyErr_Occurred()) throw PythonError();
    return value;
}

Tier as_tier(PyObject* number) {
    if (number == nullptr) return 0;
    const long tier = PyLong_AsLong(number);
    if (tier == -1 && PyErr_Occurred()) throw PythonError();
    if (tier < 1 || tier > static_cast<long>(kTiers)) {
        PyErr_Format(PyExc_ValueError, "there is no tier %ld", tier);
        throw PythonError();
    }
    return static_cast<Tier>(tier - 1);
}

BlockIndex::ModelKey as_model_key(PyObject* name, PyObject* block_size_tokens) {
    Py_ssize_t bytes;
    const char* text = PyUnicode_AsUTF8AndSize(name, &bytes);
    if (text == nullptr) throw PythonError();
    const long tokens = PyLong_AsLong(block_size_tokens);
    if (tokens == -1 && PyErr_Occurred()) throw PythonError();
    return {std::string(text, static_cast<std::size_t>(bytes)), tokens};
}

// An array of type "Q" is copied as it is.
bool copy_array(PyObject* sequence, std::vector<SequenceHash>& hashes) {
    if (!PyObject_CheckBuffer(sequence)) return false;
    Py_buffer buffer;
    if (PyObject_GetBuffer(sequence, &buffer, PyBUF_FORMAT | PyBUF_ND) < 0) throw PythonError();
    const bool is_such = buffer.ndim == 1 && buffer.format != nullptr && std::string_view(buffer.format) == "Q";
    if (is_such) {
        const auto* first = static_cast<const SequenceHash*>(buffer.buf);
        hashes.assign(first, first + buffer.len / buffer.itemsize);
    }
    PyBuffer_Release(&buffer);
    return is_such;
}

std::vector<SequenceHash> as_hashes(PyObject* sequence) {
    std::vector<SequenceHash> hashes;
    if (copy_array(sequence, hashes)) return hashes;
    const Reference items(PySequence_Fast(sequence, "hashes must be a sequence"));
    PyObject** item = PySequence_Fast_ITEMS(items.get());
    hashes.resize(static_cast<std::size_t>(PySequence_Fast_GET_SIZE(items.get())));
    for (SequenceHash& hash : hashes) hash = as_hash(*item++);
    return hashes;
}

// A prompt's hashes, of which few are looked at.
class Prompt {
public:
    explicit Prompt(PyObject* sequence)
        : sequence_(sequence), is_list_(PyList_CheckExact(sequence)), size_(PySequence_Size(sequence)) {
        if (size_ < 0) throw PythonError();
    }

    std::uint32_t size() const {
        return static_cast<std::uint32_t>(std::min<Py_ssize_t>(size_, kNone - 1));
    }

    SequenceHash operator()(std::uint32_t position) const {
        if (is_list_ && position < PyList_GET_SIZE(sequence_))
            return as_hash(PyList_GET_ITEM(sequence_, position));
        return as_hash(Reference(PySequence_GetItem(sequence_, position)).get());
    }

private:
    PyObject* sequence_;
    bool is_list_;
    Py_ssize_t size_;
};

struct Self {
    PyObject_HEAD
    BlockIndex* index;
    bool is_busy;
};

// An index can't be used from within one of its own calls, as by a prompt with a method of its own.
class Turn {
public:
    explicit Turn(Self* self) : self_(self) {
        if (self->is_busy || self->index == nullptr) {
            PyErr_SetString(PyExc_RuntimeError, "the index is in another call, or not made yet");
            throw PythonError();
        }
        self->is_busy = true;
    }
    Turn(const Turn&) = delete;
    Turn& operator=(const Turn&) = delete;
    ~Turn() { self_->is_busy = false; }

    BlockIndex* operator->() const { return self_->index; }

    Worker& worker(PyObject* instance) const {
        Worker* worker = self_->index->worker(as_unsigned(instance));
        if (worker == nullptr) {
            PyErr_SetObject(PyExc_KeyError, instance);
            throw PythonError();
        }
        return *worker;
    }

private:
    Self* self_;
};

// A method with its parameters' names, the first `required` of which must be given.
template <std::size_t parameters>
using Names = std::array<const char*, parameters>;

template <std::size_t parameters>
std::array<PyObject*, parameters> bound(const Names<parameters>& names, std::size_t required,
                                        PyObject* const* given, Py_ssize_t positional,
                                        PyObject* keywords) {
    std::array<PyObject*, parameters> values{};
    if (static_cast<std::size_t>(positional) > parameters) {
        PyErr_Format(PyExc_TypeError, "%zd arguments, of %zu at most", positional, parameters);
        throw PythonError();
    }
    std::copy_n(given, positional, values.begin());
    const Py_ssize_t named = keywords == nullptr ? 0 : PyTuple_GET_SIZE(keywords);
    for (Py_ssize_t number = 0; number < named; ++number) {
        PyObject* keyword = PyTuple_GET_ITEM(keywords, number);
        const auto name = std::ranges::find_if(names, [keyword](const char* each) {
            return PyUnicode_CompareWithASCIIString(keyword, each) == 0;
        });
        if (name == names.end() || values[static_cast<std::size_t>(name - names.begin())] != nullptr) {
            PyErr_Format(PyExc_TypeError, "%R is no parameter, or given twice", keyword);
            throw PythonError();
        }
        values[static_cast<std::size_t>(name - names.begin())] = given[positional + number];
    }
    for (std::size_t number = 0; number < required; ++number) {
        if (values[number] == nullptr) {
            PyErr_Format(PyExc_TypeError, "%s is missing", names[number]);
            throw PythonError();
        }
    }
    return values;
}

// What `body` gives, or null with Python's error set.
template <class Body>
PyObject* guarded(Body&& body) noexcept {
    try {
        return body();
    } catch (const PythonError&) {
        return nullptr;
    } catch (const std::bad_alloc&) {
        return PyErr_NoMemory();
    } catch (const Contradiction& contradiction) {
        PyErr_SetString(PyExc_AssertionError, contradiction.what());
        return nullptr;
    }
}

PyObject* add(Self* self, PyObject* const* given, Py_ssize_t count, PyObject* keywords) {
    return guarded([=] {
        static constexpr Names<3> names{"instance", "model", "block_size_tokens"};
        const auto [instance, model, block_size_tokens] = bound(names, 3, given, count, keywords);
        const Turn index(self);
        const InstanceId id = as_unsigned(instance);
        if (index->worker(id) != nullptr) {
            PyErr_Format(PyExc_AssertionError, "%R is in the index", instance);
            throw PythonError();
        }
        Reference name(PyNumber_Long(instance));
        index->add(id, as_model_key(model, block_size_tokens), name.get());
        name.release();
        return Py_NewRef(Py_None);
    });
}

PyObject* remove(Self* self, PyObject* instance) {
    return guarded([=] {
        const Turn index(self);
        const Reference name(static_cast<PyObject*>(index.worker(instance).name));
        index->remove(as_unsigned(instance));
        return Py_NewRef(Py_None);
    });
}

void store_blocks(const Turn& index, Worker& worker, PyObject* hashes, PyObject* chains, Tier tier) {
    const std::vector<SequenceHash> blocks = as_hashes(hashes);
    const std::span<const SequenceHash> all(blocks);
    std::size_t start = 0;
    std::optional<SequenceHash> before;
    if (chains != nullptr) {
        const Reference starts(PySequence_Fast(chains, "chains must be a sequence"));
        for (Py_ssize_t number = 0; number < PySequence_Fast_GET_SIZE(starts.get()); ++number) {
            PyObject* chain = PySequence_Fast_GET_ITEM(starts.get(), number);
            if (!PyTuple_Check(chain) || PyTuple_GET_SIZE(chain) != 2) {
                PyErr_SetString(PyExc_TypeError, "a chain is a position and a block or None");
                throw PythonError();
            }
            const std::size_t next = PyLong_AsSize_t(PyTuple_GET_ITEM(chain, 0));
            if (next == SIZE_MAX && PyErr_Occurred()) throw PythonError();
            if (next < start || next > all.size()) {
                PyErr_Format(PyExc_ValueError, "a chain starts at block %zu of %zu", next, all.size());
                throw PythonError();
            }
            PyObject* parent = PyTuple_GET_ITEM(chain, 1);
            std::optional<SequenceHash> next_before;
            if (parent != Py_None) next_before = as_hash(parent);
            index->store_chain(worker, all.subspan(start, next - start), before, tier);
            start = next;
            before = next_before;
        }
    }
    index->store_chain(worker, all.subspan(start), before, tier);
}

PyObject* store(Self* self, PyObject* const* given, Py_ssize_t count, PyObject* keywords) {
    return guarded([=] {
        static constexpr Names<4> names{"instance", "hashes", "chains", "tier"};
        const auto [instance, hashes, chains, tier] = bound(names, 2, given, count, keywords);
        const Turn index(self);
        store_blocks(index, index.worker(instance), hashes, chains, as_tier(tier));
        return Py_NewRef(Py_None);
    });
}

PyObject* discard(Self* self, PyObject* const* given, Py_ssize_t count, PyObject* keywords) {
    return guarded([=] {
        static constexpr Names<3> names{"instance", "hashes", "tier"};
        const auto [instance, hashes, tier] = bound(names, 2, given, count, keywords);
        const Turn index(self);
        index->discard(index.worker(instance), as_hashes(hashes), as_tier(tier));
        return Py_NewRef(Py_None);
    });
}

PyObject* clear(Self* self, PyObject* instance) {
    return guarded([=] {
        const Turn index(self);
        index->clear(index.worker(instance));
        return Py_NewRef(Py_None);
    });
}

PyObject* replace(Self* self, PyObject* const* given, Py_ssize_t count, PyObject* keywords) {
    return guarded([=] {
        static constexpr Names<4> names{"instance", "hashes", "chains", "lower_tiers"};
        const auto [instance, hashes, chains, lower_tiers] = bound(names, 2, given, count, keywords);
        const Turn index(self);
        Worker& worker = index.worker(instance);
        index->clear(worker);
        store_blocks(index, worker, hashes, chains, 0);
        if (lower_tiers == nullptr) return Py_NewRef(Py_None);
        const Reference lower(PySequence_Fast(lower_tiers, "lower_tiers must be a sequence"));
        for (Py_ssize_t number = 0; number < PySequence_Fast_GET_SIZE(lower.get()); ++number) {
            PyObject* stored = PySequence_Fast_GET_ITEM(lower.get(), number);
            const Reference lower_hashes(PyObject_GetAttrString(stored, "sequence_hashes"));
            const Reference lower_chains(PyObject_GetAttrString(stored, "chains"));
            const Reference tier(PyObject_GetAttrString(stored, "tier"));
            store_blocks(index, worker, lower_hashes.get(), lower_chains.get(), as_tier(tier.get()));
        }
        return Py_NewRef(Py_None);
    });
}

PyObject* overlap(Self* self, PyObject* const* given, Py_ssize_t count, PyObject* keywords) {
    return guarded([=] {
        static constexpr Names<4> names{"model", "block_size_tokens", "prompt", "slowest"};
        const auto [model, block_size_tokens, hashes, slowest] = bound(names, 3, given, count, keywords);
        const Turn index(self);
        const Prompt prompt(hashes);
        Reference depths(PyDict_New());
        std::uint32_t last_blocks = 0;
        std::optional<Reference> last_depth;  // Of `last_blocks`, which often come again.
        index->overlap(
            as_model_key(model, block_size_tokens), prompt, prompt.size(), as_tier(slowest),
            [&](void* name, std::uint32_t blocks) {
                if (blocks != last_blocks) last_depth.emplace(PyLong_FromUnsignedLong(blocks));
                last_blocks = blocks;
                if (PyDict_SetItem(depths.get(), static_cast<PyObject*>(name), last_depth->get()) < 0)
                    throw PythonError();
            });
        return depths.release();
    });
}

PyObject* has_lower_tiers(Self* self, PyObject* const* given, Py_ssize_t count, PyObject* keywords) {
    return guarded([=] {
        static constexpr Names<2> names{"model", "block_size_tokens"};
        const auto [name, block_size_tokens] = bound(names, 2, given, count, keywords);
        const Turn index(self);
        const Model* model = index->model(as_model_key(name, block_size_tokens));
        return PyBool_FromLong(model != nullptr && model->has_lower_tiers);
    });
}

PyObject* held(Self* self, PyObject* const* given, Py_ssize_t count, PyObject* keywords) {
    return guarded([=] {
        static constexpr Names<2> names{"instance", "tier"};
        const auto [instance, tier] = bound(names, 1, given, count, keywords);
        const Turn index(self);
        Reference blocks(PyFrozenSet_New(nullptr));
        index->each_held(index.worker(instance), as_tier(tier), [&](SequenceHash hash) {
            const Reference block(PyLong_FromUnsignedLongLong(hash));
            if (PySet_Add(blocks.get(), block.get()) < 0) throw PythonError();
        });
        return blocks.release();
    });
}

PyObject* held_blocks(Self* self, PyObject* instance) {
    return guarded([=] {
        const Turn index(self);
        return PyLong_FromUnsignedLongLong(index.worker(instance).held);
    });
}

PyObject* evicted_blocks(Self* self, PyObject* instance) {
    return guarded([=] {
        const Turn index(self);
        return PyLong_FromUnsignedLongLong(index.worker(instance).evicted);
    });
}

PyObject* check_invariants(Self* self, PyObject*) {
    return guarded([=] {
        const Turn index(self);
        index->check_invariants();
        return Py_NewRef(Py_None);
    });
}

template <std::uint64_t (BlockIndex::*count)() const>
PyObject* counted(Self* self, void*) {
    return guarded([=] {
        const Turn index(self);
        return PyLong_FromUnsignedLongLong(((*index.operator->()).*count)());
    });
}

int make(Self* self, PyObject* arguments, PyObject* keywords) {
    static const char* names[] = {"max_bytes", nullptr};
    PyObject* max_bytes;
    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "O", const_cast<char**>(names), &max_bytes))
        return -1;
    return guarded([=] {
        if (self->index != nullptr) {
            PyErr_SetString(PyExc_RuntimeError, "the index is made already");
            throw PythonError();
        }
        self->index = new BlockIndex(as_unsigned(max_bytes));
        return Py_None;
    }) == nullptr ? -1 : 0;
}

void unmake(Self* self) {
    if (self->index != nullptr)
        self->index->each_name([](void* name) { Py_DECREF(static_cast<PyObject*>(name)); });
    delete self->index;
    PyTypeObject* type = Py_TYPE(self);
    type->tp_free(self);
    Py_DECREF(type);
}

template <class Function>
constexpr PyMethodDef method(const char* name, Function* function, int flags, const char* signature) {
    return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), flags, signature};
}

constexpr int kNamed = METH_FASTCALL | METH_KEYWORDS;

PyMethodDef methods[] = {
    method("add", add, kNamed, "add($self, instance, model, block_size_tokens)\n--\n\n"),
    method("remove", remove, METH_O, "remove($self, instance)\n--\n\n"),
    method("store", store, kNamed, "store($self, instance, hashes, chains=(), tier=1)\n--\n\n"),
    method("discard", discard, kNamed, "discard($self, instance, hashes, tier=1)\n--\n\n"),
    method("clear", clear, METH_O, "clear($self, instance)\n--\n\n"),
    method("replace", replace, kNamed,
           "replace($self, instance, hashes, chains=(), lower_tiers=())\n--\n\n"),
    method("overlap", overlap, kNamed,
           "overlap($self, model, block_size_tokens, prompt, slowest=1)\n--\n\n"),
    method("has_lower_tiers", has_lower_tiers, kNamed,
           "has_lower_tiers($self, model, block_size_tokens)\n--\n\n"),
    method("held", held, kNamed, "held($self, instance, tier=1)\n--\n\n"),
    method("held_blocks", held_blocks, METH_O, "held_blocks($self, instance)\n--\n\n"),
    method("evicted_blocks", evicted_blocks, METH_O, "evicted_blocks($self, instance)\n--\n\n"),
    method("check_invariants", check_invariants, METH_NOARGS, "check_invariants($self)\n--\n\n"),
    {nullptr, nullptr, 0, nullptr},
};

PyGetSetDef figures[] = {
    {"blocks", reinterpret_cast<getter>(counted<&BlockIndex::blocks>), nullptr, nullptr, nullptr},
    {"evicted", reinterpret_cast<getter>(counted<&BlockIndex::evicted>), nullptr, nullptr, nullptr},
    {"used_bytes", reinterpret_cast<getter>(counted<&BlockIndex::used_bytes>), nullptr, nullptr, nullptr},
    {nullptr, nullptr, nullptr, nullptr, nullptr},
};

PyType_Slot slots[] = {
    {Py_tp_new, reinterpret_cast<void*>(PyType_GenericNew)},
    {Py_tp_init, reinterpret_cast<void*>(make)},
    {Py_tp_dealloc, reinterpret_cast<void*>(unmake)},
    {Py_tp_methods, methods},
    {Py_tp_getset, figures},
    {0, nullptr},
};

PyType_Spec type_spec = {
    "switchgear_block_index.BlockIndex", sizeof(Self), 0, Py_TPFLAGS_DEFAULT, slots,
};

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "switchgear_block_index", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr,
};

}  // namespace
}  // namespace switchgear

PyMODINIT_FUNC PyInit_switchgear_block_index() {
    using namespace switchgear;
    return guarded([] {
        Reference module(PyModule_Create(&definition));
        const Reference type(PyType_FromSpec(&type_spec));
        for (const auto& [name, value] : {std::pair{"block_bytes", kBlockBytes}, {"holders_bytes", kHoldersBytes}}) {
            const Reference number(PyLong_FromUnsignedLongLong(value));
            if (PyObject_SetAttrString(type.get(), name, number.get()) < 0) throw PythonError();
        }
        if (PyModule_AddObjectRef(module.get(), "BlockIndex", type.get()) < 0 ||
            PyModule_AddStringConstant(module.get(), "SOURCES", SWITCHGEAR_SOURCES) < 0)
            throw PythonError();
        return module.release();
    });
}
