// Threads that wait between kernels by spinning for a while.
//
// A layer of a model that decodes makes some ten kernel calls of 50 to 500 microseconds each. OpenMP's runtime
// puts its threads to sleep between them as soon as any other thread of the process has had a team of its own,
// and waking them takes longer than a call. Threads of this pool join a loop when they notice it and take one
// item at a time, so a thread that does not run costs nothing but its help.
#pragma once
#include <cstdint>

// Call `body(context, item)` for items 0 to number - 1, in any order, on the calling thread and on others; as
// many in all as OpenMP would use. Returns once all are done. Memory written before the call is visible to
// `body`, and what `body` writes to the caller afterwards.
void run_items(int64_t number, void (*body)(void *context, int64_t item), void *context);

// The same for a function object.
template <typename F>
inline void each(int64_t number, const F &f) {
    run_items(number, [](void *context, int64_t item) { (*static_cast<const F *>(context))(item); },
              const_cast<F *>(&f));
}
