// Working after fork().
#pragma once

namespace m2d::cpu {

// To be called before any parallel work. The child of a fork() inherits the OpenMP runtime's record of its
// threads but not the threads, and with GNU's runtime the first parallel region waits for them for ever. A
// forked process therefore goes on with one thread, as torch's DataLoader workers do, whatever it has chosen before.
void use_one_thread_after_fork();

}  // namespace m2d::cpu
