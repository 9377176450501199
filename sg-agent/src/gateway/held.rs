//! Answers to changes, held until the change is enforced and the client takes them. Owns how much may be held of one, and
//! of all together.

use std::sync::Arc;

use http::HeaderMap;
use http_body_util::BodyExt as _;
use hyper::body::{Body, Bytes};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::upstream::innermost;

/// The longest answer to a change that is held, far above RunInstances of a thousand.
const LONGEST: usize = 64 << 20;

/// The most that is held at the same time, beside [`SMALL`] of each.
const MOST: usize = 4 * LONGEST;

/// So much of an answer takes no room from others: nearly all are shorter, and none of those has to do without.
const SMALL: usize = 16 << 10;

/// Room for answers.
#[derive(Debug)]
pub struct Room {
    free: Arc<Semaphore>,
    longest: usize,
}

/// An answer that is held.
pub struct Held {
    /// Its bytes; their room is free again when the last of them is dropped.
    pub bytes: Bytes,
    pub trailers: Option<HeaderMap>,
}

/// Why an answer isn't held.
#[derive(Debug, thiserror::Error)]
pub enum Unheld {
    /// It ended too early.
    #[error("{0}")]
    Broken(String),
    /// It is longer than any may be.
    #[error("its answer is longer than {} MiB", .0 >> 20)]
    TooLong(usize),
    /// Others take too much room.
    #[error("too many long answers wait for their clients")]
    NoRoom,
}

/// Bytes with the room that they take.
struct Roomed {
    bytes: Vec<u8>,
    _room: OwnedSemaphorePermit,
}

impl AsRef<[u8]> for Roomed {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Default for Room {
    fn default() -> Self {
        Self::of(LONGEST, MOST)
    }
}

impl Room {
    fn of(longest: usize, most: usize) -> Self {
        Self { free: Arc::new(Semaphore::new(most)), longest }
    }

    /// Takes an answer to its last byte, whether or not there is room: only then has the endpoint done all that it does.
    pub async fn hold<B>(&self, mut body: B) -> Result<Held, Unheld>
    where
        B: Body<Data = Bytes, Error: std::error::Error + 'static> + Unpin,
    {
        let mut held = Ok((Vec::new(), self.more(0)?));
        let mut trailers = None;
        while let Some(frame) = body.frame().await {
            match frame.map_err(|error| Unheld::Broken(innermost(&error)))?.into_data() {
                Ok(data) => held = held.and_then(|(bytes, room)| self.add(bytes, room, &data)),
                Err(frame) => trailers = frame.into_trailers().ok(),
            }
        }
        let (bytes, room) = held?;
        Ok(Held { bytes: Bytes::from_owner(Roomed { bytes, _room: room }), trailers })
    }

    fn add(
        &self,
        mut bytes: Vec<u8>,
        mut room: OwnedSemaphorePermit,
        data: &[u8],
    ) -> Result<(Vec<u8>, OwnedSemaphorePermit), Unheld> {
        let length = bytes.len() + data.len();
        if length > self.longest {
            return Err(Unheld::TooLong(self.longest));
        }
        room.merge(self.more(length.saturating_sub(SMALL) - room.num_permits())?);
        bytes.extend_from_slice(data);
        Ok((bytes, room))
    }

    fn more(&self, bytes: usize) -> Result<OwnedSemaphorePermit, Unheld> {
        let permits = u32::try_from(bytes).map_err(|_| Unheld::NoRoom)?;
        Arc::clone(&self.free).try_acquire_many_owned(permits).map_err(|_| Unheld::NoRoom)
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

    use futures_util::StreamExt as _;
    use http_body_util::{Full, StreamBody};
    use hyper::body::Frame;

    use super::*;

    async fn hold(room: &Room, length: usize) -> Result<Held, Unheld> {
        room.hold(Full::new(Bytes::from(vec![7; length]))).await
    }

    #[tokio::test]
    async fn the_sum_of_long_answers_is_bounded_and_short_ones_are_held_at_any_rate() {
        let room = Room::of(100 << 10, 100 << 10);
        let first = hold(&room, SMALL + (60 << 10)).await.unwrap();
        assert_eq!(first.bytes.len(), SMALL + (60 << 10));
        let second = hold(&room, SMALL + (40 << 10)).await.unwrap();
        assert!(matches!(hold(&room, SMALL + 1).await, Err(Unheld::NoRoom)));
        let short = hold(&room, SMALL).await.unwrap();
        // As long as anybody has some of it.
        let rest = first.bytes.slice(1..2);
        drop((first, short));
        assert!(matches!(hold(&room, SMALL + 1).await, Err(Unheld::NoRoom)));
        drop(rest);
        let third = hold(&room, SMALL + (60 << 10)).await.unwrap();
        drop((second, third));
        assert_eq!(room.free.available_permits(), 100 << 10);
        assert!(matches!(hold(&room, (100 << 10) + 1).await, Err(Unheld::TooLong(_))));
    }

    #[tokio::test]
    async fn what_is_not_held_is_read_to_its_end_and_takes_no_room() {
        let room = Room::of(30 << 10, 100 << 10);
        let read = AtomicUsize::new(0);
        let frames = futures_util::stream::iter(vec![Bytes::from(vec![7; 10 << 10]); 5]).map(|data| {
            assert!(read.fetch_add(1, Relaxed) < 4 || room.free.available_permits() == 100 << 10, "it is let go");
            Ok::<_, Infallible>(Frame::data(data))
        });
        let held = room.hold(StreamBody::new(frames)).await;
        assert!(matches!(held, Err(Unheld::TooLong(_))));
        assert_eq!(read.load(Relaxed), 5);
    }
}
