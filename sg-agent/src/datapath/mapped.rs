//! Array maps in the agent's memory: a store is a store, not a system call, and a word changes in one.
//!
//! All pages of a mapping count as the agent's memory from the start, so only what is used is mapped.

use std::io;
use std::marker::PhantomData;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::libc::off_t;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

/// Words that are mapped at once: 256 KiB, whole pages on every architecture.
const PART: usize = 32_768;

/// A `BPF_F_MMAPABLE` array whose values are 64-bit words.
#[derive(Debug)]
pub struct MappedWords {
    map: OwnedFd,
    words: usize,
    parts: Box<[OnceLock<Part>]>,
}

impl MappedWords {
    /// The `words` values of the array behind `fd`. None of them is mapped yet.
    ///
    /// # Errors
    /// Those of one more open file.
    pub fn new(fd: impl AsFd, words: usize) -> io::Result<Self> {
        let parts = (0..words.div_ceil(PART)).map(|_| OnceLock::new()).collect();
        Ok(Self { map: fd.as_fd().try_clone_to_owned()?, words, parts })
    }

    /// Maps these words, for [`Self::store`] and [`Self::load`].
    ///
    /// # Errors
    /// The system call's, or those beyond the end.
    pub fn reach(&self, words: Range<u32>) -> io::Result<()> {
        if words.is_empty() {
            return Ok(());
        }
        if words.end as usize > self.words {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        for number in words.start as usize / PART..=(words.end as usize - 1) / PART {
            if self.parts[number].get().is_none() {
                let first = number * PART;
                let part = Part::new(&self.map, first, PART.min(self.words - first))?;
                // Whoever else has mapped it meanwhile has mapped the same.
                let _ = self.parts[number].set(part);
            }
        }
        Ok(())
    }

    /// Stores one word, at once and whole. Everything written before is visible to whoever sees it.
    ///
    /// # Panics
    /// Where `index` isn't within [`Self::reach`].
    pub fn store(&self, index: u32, value: u64) {
        self.word(index).store(value, Ordering::Release);
    }

    /// Reads one word.
    ///
    /// # Panics
    /// Where `index` isn't within [`Self::reach`].
    pub fn load(&self, index: u32) -> u64 {
        self.word(index).load(Ordering::Acquire)
    }

    fn word(&self, index: u32) -> &AtomicU64 {
        let part = self.parts.get(index as usize / PART).and_then(OnceLock::get);
        let Some(part) = part else { panic!("word {index} of {} isn't mapped", self.words) };
        part.word(index as usize % PART)
    }
}

/// Words that are mapped.
#[derive(Debug)]
struct Part {
    start: NonNull<AtomicU64>,
    words: usize,
    shared: PhantomData<AtomicU64>,
}

// SAFETY: the mapping is plain shared memory that is accessed through atomics only, and lives as long as the value.
unsafe impl Send for Part {}
// SAFETY: as above.
unsafe impl Sync for Part {}

impl Part {
    fn new(map: impl AsFd, first: usize, words: usize) -> io::Result<Self> {
        let length = NonZeroUsize::new(words * size_of::<u64>()).ok_or(io::ErrorKind::InvalidInput)?;
        let offset = off_t::try_from(first * size_of::<u64>()).map_err(io::Error::other)?;
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice overlaps nothing.
        let start = unsafe { mmap(None, length, access, MapFlags::MAP_SHARED, map, offset)? };
        Ok(Self { start: start.cast(), words, shared: PhantomData })
    }

    fn word(&self, index: usize) -> &AtomicU64 {
        assert!(index < self.words, "word {index} of {}", self.words);
        // SAFETY: within the mapping, as was just asserted; a page is aligned for any word.
        unsafe { self.start.add(index).as_ref() }
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        // SAFETY: the mapping that `new` made, of which no reference outlives `self`.
        let result = unsafe { munmap(self.start.cast(), self.words * size_of::<u64>()) };
        debug_assert!(result.is_ok(), "{result:?}");
    }
}
