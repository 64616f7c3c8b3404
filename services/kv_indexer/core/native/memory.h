// Where the index takes its memory from: Python's allocator, so that `tracemalloc` sees it.
#pragma once

#include <Python.h>

#include <cstddef>
#include <cstdint>
#include <new>
#include <type_traits>
#include <vector>

namespace switchgear {

inline void* resized(void* memory, std::size_t bytes) {
    void* got = PyMem_RawRealloc(memory, bytes);
    if (got == nullptr) throw std::bad_alloc();
    return got;
}

template <class T>
struct Traced {
    using value_type = T;

    Traced() = default;
    template <class U>
    Traced(const Traced<U>&) {}

    T* allocate(std::size_t count) { return static_cast<T*>(resized(nullptr, count * sizeof(T))); }
    void deallocate(T* memory, std::size_t) { PyMem_RawFree(memory); }

    friend bool operator==(const Traced&, const Traced&) { return true; }
};

template <class T>
using Vector = std::vector<T, Traced<T>>;

// Plain values side by side, in an array that is at most a quarter larger than they need.
template <class T>
class Array {
    static_assert(std::is_trivially_copyable_v<T>);
    static constexpr std::size_t kLeast = 64;

public:
    Array() = default;
    Array(const Array&) = delete;
    Array& operator=(const Array&) = delete;
    ~Array() { PyMem_RawFree(values_); }

    std::size_t size() const { return size_; }
    T& operator[](std::size_t number) { return values_[number]; }
    const T& operator[](std::size_t number) const { return values_[number]; }

    void push(const T& value) {
        if (size_ == capacity_) reserve(size_ + size_ / 4);
        values_[size_++] = value;
    }

    // Drops what is past the end, and its memory.
    void truncate(std::size_t size) {
        size_ = size;
        reserve(size);
    }

private:
    void reserve(std::size_t capacity) {
        capacity_ = capacity < kLeast ? kLeast : capacity;
        values_ = static_cast<T*>(resized(values_, capacity_ * sizeof(T)));
    }

    T* values_ = nullptr;
    std::size_t size_ = 0, capacity_ = 0;
};

}  // namespace switchgear
