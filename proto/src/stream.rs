//! The output streams of a run.

use std::ops::{Index, IndexMut};

/// One of the output streams of a run, in the order of the protocol's offsets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Stream {
    Stdout,
    Stderr,
    /// The contents of the run's artifacts, one after the other.
    Artifacts,
    /// What the agent of a prompt does, in lines: see [`crate::agent`].
    Events,
}

impl Stream {
    pub const ALL: [Self; 4] = [Self::Stdout, Self::Stderr, Self::Artifacts, Self::Events];

    /// Its name in file names, logs and events.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Stdout => "stdout",
            Self::Stderr => "stderr",
            Self::Artifacts => "artifacts",
            Self::Events => "events",
        }
    }

    /// Its number in `Lost.stream` of `polydev.node.v1` and `polydev.runtime.v1`, and in
    /// `Data.stream` of `polydev.init.v1`.
    #[must_use]
    pub fn number(self) -> i32 {
        match self {
            Self::Stdout => 1,
            Self::Stderr => 2,
            Self::Artifacts => 3,
            Self::Events => 4,
        }
    }

    /// The stream with this [number](Self::number); `None` if a newer protocol defines it.
    #[must_use]
    pub fn of_number(number: i32) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|stream| stream.number() == number)
    }
}

/// A value for each stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PerStream<T>([T; 4]);

impl<T> PerStream<T> {
    #[must_use]
    pub const fn new(stdout: T, stderr: T, artifacts: T, events: T) -> Self {
        Self([stdout, stderr, artifacts, events])
    }

    /// Builds a value for each stream.
    pub fn from_fn(value: impl FnMut(Stream) -> T) -> Self {
        Self(Stream::ALL.map(value))
    }

    /// Iterates in the order of [`Stream::ALL`].
    pub fn iter(&self) -> impl Iterator<Item = (Stream, &T)> {
        Stream::ALL.into_iter().zip(&self.0)
    }

    /// As [`PerStream::iter`], for values that change.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = (Stream, &mut T)> {
        Stream::ALL.into_iter().zip(&mut self.0)
    }

    /// The values, in the order of [`Stream::ALL`].
    #[must_use]
    pub fn into_array(self) -> [T; 4] {
        self.0
    }
}

impl<T> From<[T; 4]> for PerStream<T> {
    fn from(values: [T; 4]) -> Self {
        Self(values)
    }
}

impl<T> Index<Stream> for PerStream<T> {
    type Output = T;

    fn index(&self, stream: Stream) -> &T {
        &self.0[stream as usize]
    }
}

impl<T> IndexMut<Stream> for PerStream<T> {
    fn index_mut(&mut self, stream: Stream) -> &mut T {
        &mut self.0[stream as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::init;

    #[test]
    fn a_stream_has_the_number_of_the_protocol() {
        for stream in Stream::ALL {
            assert_eq!(Stream::of_number(stream.number()), Some(stream));
            let same =
                init::Stream::from_str_name(&format!("STREAM_{}", stream.name().to_uppercase()));
            assert_eq!(same.map(i32::from), Some(stream.number()));
        }
        for unknown in [-1, 0, 5] {
            assert_eq!(Stream::of_number(unknown), None);
        }
    }

    #[test]
    fn each_stream_has_a_value_of_its_own() {
        let mut lengths = PerStream::new(1, 2, 3, 4);
        lengths[Stream::Stderr] = 5;
        assert_eq!(lengths, PerStream::from([1, 5, 3, 4]));
        assert_eq!(lengths, PerStream::from_fn(|stream| lengths[stream]));
        let named: Vec<_> = lengths.iter().map(|(stream, _)| stream.name()).collect();
        assert_eq!(named, ["stdout", "stderr", "artifacts", "events"]);
    }
}
