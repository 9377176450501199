//! Array maps in the agent's memory: a store is a store, not a system call, and a word changes in one.

use std::io;
use std::marker::PhantomData;
use std::num::NonZeroUsize;
use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

/// A `BPF_F_MMAPABLE` array whose values are 64-bit words.
#[derive(Debug)]
pub struct MappedWords {
    start: NonNull<AtomicU64>,
    words: usize,
    shared: PhantomData<AtomicU64>,
}

// SAFETY: the mapping is plain shared memory that is accessed through atomics only, and lives as long as the value.
unsafe impl Send for MappedWords {}
// SAFETY: as above.
unsafe impl Sync for MappedWords {}

impl MappedWords {
    /// Maps the `words` values of the array behind `fd`.
    ///
    /// # Errors
    /// The system call's.
    pub fn new(fd: impl AsFd, words: usize) -> io::Result<Self> {
        let length = NonZeroUsize::new(words * size_of::<u64>()).ok_or(io::ErrorKind::InvalidInput)?;
        // SAFETY: a new mapping at an address of the kernel's choice overlaps nothing.
        let start =
            unsafe { mmap(None, length, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_SHARED, fd, 0)? };
        Ok(Self { start: start.cast(), words, shared: PhantomData })
    }

    /// Stores one word, at once and whole. Everything written before is visible to whoever sees it.
    ///
    /// # Panics
    /// Where `index` is out of bounds.
    pub fn store(&self, index: u32, value: u64) {
        self.word(index).store(value, Ordering::Release);
    }

    /// Reads one word.
    ///
    /// # Panics
    /// Where `index` is out of bounds.
    pub fn load(&self, index: u32) -> u64 {
        self.word(index).load(Ordering::Acquire)
    }

    fn word(&self, index: u32) -> &AtomicU64 {
        assert!((index as usize) < self.words, "word {index} of {}", self.words);
        // SAFETY: within the mapping, as was just asserted; a page is aligned for any word.
        unsafe { self.start.add(index as usize).as_ref() }
    }
}

impl Drop for MappedWords {
    fn drop(&mut self) {
        // SAFETY: the mapping that `new` made, of which no reference outlives `self`.
        let result = unsafe { munmap(self.start.cast(), self.words * size_of::<u64>()) };
        debug_assert!(result.is_ok(), "{result:?}");
    }
}
