/* What the thread sanitizer has to know of the standard library.
 *
 * It knows what happens before what from the atomic accesses that it sees, and those inside of the standard library, which
 * comes compiled without it, it does not see. Most are inlined into our code all the same. The rest are the functions
 * below, where threads wait for each other: they are wrapped (`ld --wrap`), and the wrapper tells. The symbols are those of
 * the toolchain in rust-toolchain.toml; with another one linking fails, and `nm -D` on its libstd tells the new ones.
 * References and flags are passed as in C, which is not promised, but so.
 */
#include <stdbool.h>
#include <stdint.h>

void __tsan_acquire(void *at);
void __tsan_release(void *at);

#define REAL(result, name, symbol, ...) result name(__VA_ARGS__) __asm__("__real_" symbol)
#define WRAP(result, name, symbol, ...) result name(__VA_ARGS__) __asm__("__wrap_" symbol)
#define BOTH(result, name, symbol, ...) \
    REAL(result, real_##name, symbol, __VA_ARGS__); \
    WRAP(result, name, symbol, __VA_ARGS__)

#define SYNC "CsjrHSEGnQ3l9_3std3sys4sync"

/* Mutex: the lock was taken after a wait. */
BOTH(void, mutex_lock, "_RNvMNtNtNtNt" SYNC "5mutex5futexNtB2_5Mutex14lock_contended", char *mutex);
void mutex_lock(char *mutex) {
    real_mutex_lock(mutex);
    __tsan_acquire(mutex);
}

/* RwLock: two words, the first of which is its state. */
BOTH(void, rwlock_read, "_RNvMNtNtNtNt" SYNC "6rwlock5futexNtB2_6RwLock14read_contended", char *lock);
void rwlock_read(char *lock) {
    real_rwlock_read(lock);
    __tsan_acquire(lock);
}
BOTH(void, rwlock_write, "_RNvMNtNtNtNt" SYNC "6rwlock5futexNtB2_6RwLock15write_contended", char *lock);
void rwlock_write(char *lock) {
    real_rwlock_write(lock);
    __tsan_acquire(lock);
}

/* Condvar: lets go of the mutex, and takes it again. */
BOTH(void, condvar_wait, "_RNvMNtNtNtNt" SYNC "7condvar5futexNtB2_7Condvar4wait", char *condvar, char *mutex);
void condvar_wait(char *condvar, char *mutex) {
    __tsan_release(mutex);
    real_condvar_wait(condvar, mutex);
    __tsan_acquire(mutex);
}
BOTH(bool, condvar_wait_timeout, "_RNvMNtNtNtNt" SYNC "7condvar5futexNtB2_7Condvar12wait_timeout", char *condvar,
     char *mutex, uint64_t seconds, uint32_t nanoseconds);
bool condvar_wait_timeout(char *condvar, char *mutex, uint64_t seconds, uint32_t nanoseconds) {
    __tsan_release(mutex);
    bool in_time = real_condvar_wait_timeout(condvar, mutex, seconds, nanoseconds);
    __tsan_acquire(mutex);
    return in_time;
}

/* Barrier: everything before it happens before everything after it. */
BOTH(bool, barrier_wait, "_RNvMs0_NtNtCsjrHSEGnQ3l9_3std4sync7barrierNtB5_7Barrier4wait", char *barrier);
bool barrier_wait(char *barrier) {
    __tsan_release(barrier);
    bool is_leader = real_barrier_wait(barrier);
    __tsan_acquire(barrier);
    return is_leader;
}

/* Scope: a thread ends, and the scope waits for the count of its threads, the place of which is not known. */
BOTH(void, scope_end, "_RNvMNtNtCsjrHSEGnQ3l9_3std6thread6scopedNtB2_9ScopeData29decrement_num_running_threads",
     char *scope, bool panicked);
void scope_end(char *scope, bool panicked) {
    for (int word = 0; word < 3; word++)
        __tsan_release(scope + 8 * word);
    real_scope_end(scope, panicked);
}

/* Once: runs a closure (`&mut dyn FnMut`), then publishes that it is done. The closure is replaced by one that calls
 * it and releases. */
typedef void (*call)(void *data, void *argument);
struct vtable {
    call drop;
    uintptr_t size, align;
    call call_once, call_mut;
};
struct closure {
    void *data;
    const struct vtable *vtable;
    char *once;
};
static void call_and_release(void *data, void *argument) {
    struct closure *closure = data;
    closure->vtable->call_mut(closure->data, argument);
    __tsan_release(closure->once);
}
BOTH(void, once_call, "_RNvMs0_NtNtNtNt" SYNC "4once5futexNtB5_4Once4call", char *once, bool ignore_poisoning,
     void *data, const struct vtable *vtable, void *location);
void once_call(char *once, bool ignore_poisoning, void *data, const struct vtable *vtable, void *location) {
    static const struct vtable releasing = {0, sizeof(struct closure), 8, call_and_release, call_and_release};
    struct closure closure = {data, vtable, once};
    real_once_call(once, ignore_poisoning, &closure, &releasing, location);
    __tsan_acquire(once);
}
