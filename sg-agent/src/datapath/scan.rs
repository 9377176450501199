//! Reading a map again and again, a part at a time. What should be in it is the caller's.

use std::io;
use std::os::fd::AsFd;

use aya::Pod;

use super::sys::{self, Cursor, Entries};

/// How far a map has been read.
#[derive(Clone, Debug, Default)]
pub struct Scan {
    cursor: Option<Cursor>,
    seen: usize,
}

impl Scan {
    /// The next entries, about `most`. At the map's end also how many it had in all; the reading then begins again.
    ///
    /// # Errors
    /// The kernel's.
    pub fn read<K: Pod, V: Pod>(&mut self, map: impl AsFd, most: usize) -> io::Result<(Entries<K, V>, Option<usize>)> {
        let (entries, cursor) = match sys::entries(map, self.cursor.as_ref(), most) {
            Ok(read) => read,
            Err(error) => {
                // Most likely a key that has gone meanwhile.
                *self = Self::default();
                return Err(error);
            }
        };
        self.seen += entries.len();
        self.cursor = cursor;
        if self.cursor.is_some() {
            return Ok((entries, None));
        }
        Ok((entries, Some(std::mem::take(&mut self.seen))))
    }
}
