//! The seed of the broker's key. It outlives the process, in memory that the driver keeps: a
//! broker that takes the place of a dead one opens what was sealed for that one.

use std::{
    fs::File,
    io,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::fs::FileExt,
    },
};

use polydev_proto::sealed::PrivateKey;
use rustix::rand::{GetRandomFlags, getrandom};
use zeroize::Zeroizing;

const LENGTH: usize = 32;

/// The memory with the seed.
#[derive(Debug)]
pub struct Seed(File);

impl Seed {
    /// Makes a seed in memory that is empty.
    ///
    /// # Errors
    /// If the memory cannot be read or written.
    pub fn new(memory: File) -> io::Result<Self> {
        if memory.metadata()?.len() == 0 {
            let mut seed = Zeroizing::new([0; LENGTH]);
            // So few bytes come at once.
            getrandom(&mut *seed, GetRandomFlags::empty())?;
            memory.write_all_at(&*seed, 0)?;
        }
        Ok(Self(memory))
    }

    /// # Errors
    /// If the memory cannot be read.
    pub fn key(&self) -> io::Result<PrivateKey> {
        let mut seed = Zeroizing::new([0; LENGTH]);
        self.0.read_exact_at(&mut *seed, 0)?;
        Ok(PrivateKey::derive(&*seed))
    }

    pub(crate) fn memory(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
