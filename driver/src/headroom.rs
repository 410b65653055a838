//! What all runs of a node may use together, on top of what Nomad reserves for their idle
//! slots. Nomad counts only the idle limits.

use std::{
    fmt,
    sync::{Arc, Once},
};

use parking_lot::Mutex;
use procfs::{Current, Meminfo};

use crate::limits::Limits;

/// CPU and memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
pub struct Amount {
    /// 1,000 MHz stand for one core.
    pub cpu_mhz: u32,
    /// MiB.
    pub memory_mb: u32,
}

impl Amount {
    /// What a run needs on top of its idle slot.
    #[must_use]
    pub fn on_top(run: &Limits, idle: &Limits) -> Self {
        Self {
            cpu_mhz: run.cpu_mhz.saturating_sub(idle.cpu_mhz),
            memory_mb: run.memory_mb.saturating_sub(idle.memory_mb),
        }
    }

    fn checked_sub(self, other: Self) -> Option<Self> {
        Some(Self {
            cpu_mhz: self.cpu_mhz.checked_sub(other.cpu_mhz)?,
            memory_mb: self.memory_mb.checked_sub(other.memory_mb)?,
        })
    }
}

impl From<&Limits> for Amount {
    fn from(limits: &Limits) -> Self {
        Self {
            cpu_mhz: limits.cpu_mhz,
            memory_mb: limits.memory_mb,
        }
    }
}

impl fmt::Display for Amount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} MHz and {} MiB", self.cpu_mhz, self.memory_mb)
    }
}

/// The node has no room for another run. Another node may have.
#[derive(Debug, thiserror::Error)]
pub enum Full {
    #[error("a run needs {needed} of `run_headroom`, which has {left} left")]
    Taken { needed: Amount, left: Amount },
    #[error("a run needs {needed_mb} MiB, but the kernel has only {available_mb} MiB available")]
    Memory { needed_mb: u64, available_mb: u64 },
}

/// The headroom of one node.
#[derive(Debug)]
pub struct Headroom {
    /// What the operator configured; `None` if not set.
    pub given: Option<Amount>,
    /// The part that is free.
    left: Option<Mutex<Amount>>,
    warned: Once,
}

impl Headroom {
    #[must_use]
    pub fn new(given: Option<Amount>) -> Arc<Self> {
        Arc::new(Self {
            given,
            left: given.map(Mutex::new),
            warned: Once::new(),
        })
    }

    /// The free part of what the operator configured.
    #[must_use]
    pub fn left(&self) -> Option<Amount> {
        self.left.as_ref().map(|left| *left.lock())
    }

    /// Reserves what a run needs until the share is dropped. If the operator set no figure,
    /// the kernel's available memory decides. CPU time is not checked then, because it can
    /// always be shared.
    ///
    /// # Errors
    /// [`Full`] with the figures.
    pub fn take(self: &Arc<Self>, needed: Amount) -> Result<Share, Full> {
        match &self.left {
            Some(left) => {
                let mut left = left.lock();
                *left = left.checked_sub(needed).ok_or(Full::Taken {
                    needed,
                    left: *left,
                })?;
            }
            None => {
                self.warned.call_once(|| {
                    tracing::warn!(
                        "`run_headroom` is not set: claims are granted as long as the kernel reports enough available memory"
                    );
                });
                let needed_mb = u64::from(needed.memory_mb);
                let available = Meminfo::current().ok().and_then(|info| info.mem_available);
                // If the kernel does not report a value, memory counts as sufficient.
                let available_mb = available.map_or(u64::MAX, |bytes| bytes >> 20);
                if available_mb < needed_mb {
                    return Err(Full::Memory {
                        needed_mb,
                        available_mb,
                    });
                }
            }
        }
        Ok(Share {
            headroom: self.clone(),
            amount: needed,
        })
    }

    /// The share of a run that an earlier life of the driver admitted. It is taken even if
    /// it does not fit.
    #[must_use]
    pub fn take_back(self: &Arc<Self>, amount: Amount) -> Share {
        let mut taken = amount;
        if let Some(left) = &self.left {
            let mut left = left.lock();
            taken = Amount {
                cpu_mhz: amount.cpu_mhz.min(left.cpu_mhz),
                memory_mb: amount.memory_mb.min(left.memory_mb),
            };
            left.cpu_mhz -= taken.cpu_mhz;
            left.memory_mb -= taken.memory_mb;
        }
        Share {
            headroom: self.clone(),
            amount: taken,
        }
    }
}

/// A run's part of the headroom; dropping it gives it back.
#[derive(Debug)]
pub struct Share {
    headroom: Arc<Headroom>,
    amount: Amount,
}

impl Drop for Share {
    fn drop(&mut self) {
        if let Some(left) = &self.headroom.left {
            let mut left = left.lock();
            left.cpu_mhz += self.amount.cpu_mhz;
            left.memory_mb += self.amount.memory_mb;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn never_more_is_taken_than_was_given_and_all_comes_back(
            steps in prop::collection::vec((any::<bool>(), 0u32..900, 0u32..900), 0..100),
        ) {
            let given = Amount { cpu_mhz: 2000, memory_mb: 1500 };
            let headroom = Headroom::new(Some(given));
            let mut held: Vec<Share> = Vec::new();
            for (take, cpu_mhz, memory_mb) in steps {
                if take {
                    let needed = Amount { cpu_mhz, memory_mb };
                    let taken = |of: fn(&Amount) -> u32| held.iter().map(|share| of(&share.amount)).sum::<u32>();
                    let fits = taken(|amount| amount.cpu_mhz) + cpu_mhz <= given.cpu_mhz
                        && taken(|amount| amount.memory_mb) + memory_mb <= given.memory_mb;
                    let share = headroom.take(needed);
                    prop_assert_eq!(share.is_ok(), fits);
                    held.extend(share.ok());
                } else {
                    held.pop();
                }
            }
            held.clear();
            prop_assert!(headroom.take(given).is_ok());
        }
    }

    #[test]
    fn without_a_figure_the_kernel_decides() {
        let headroom = Headroom::new(None);
        let needs = |memory_mb| Amount {
            cpu_mhz: 1,
            memory_mb,
        };
        assert!(headroom.take(needs(1)).is_ok());
        let refused = headroom.take(needs(u32::MAX)).unwrap_err().to_string();
        assert!(
            refused.starts_with("a run needs 4294967295 MiB, but the kernel has only "),
            "{refused}"
        );
    }

    #[test]
    fn a_refusal_names_the_figures() {
        let run = Amount::on_top(&Limits::RUN, &Limits::IDLE);
        let headroom = Headroom::new(Some(run));
        let _share = headroom.take(run).unwrap();
        assert_eq!(
            headroom.take(run).unwrap_err().to_string(),
            "a run needs 400 MHz and 256 MiB of `run_headroom`, which has 0 MHz and 0 MiB left"
        );
    }
}
