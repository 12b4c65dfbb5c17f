/* For loops that look at memory again and again. Any thread. */
#ifndef ATTND_BASE_PAUSE_H
#define ATTND_BASE_PAUSE_H

/* Some ten nanoseconds in which the core leaves its resources to its other thread; nothing, where it has none. */
static inline void attn_pause(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

#endif
