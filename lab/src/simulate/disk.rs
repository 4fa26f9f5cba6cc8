//! A disk that forgets what was not synced.
//!
//! Writes come in transactions, are synced one after another in their order, and take effect only then. A crash keeps a
//! prefix of what was under way, of a length the caller draws: power may fail just before a sync, or just after one that nobody has
//! been told of.

use std::collections::VecDeque;

/// What a disk holds, and how one write `W` changes it.
pub trait Store<W> {
    /// Makes the change.
    fn apply(&mut self, write: &W);
}

/// A durable store and the transactions of writes `W` on their way to it. `T` is what the program does once its transaction is durable.
#[derive(Debug)]
pub struct Disk<S, W, T> {
    durable: S,
    pending: VecDeque<(Vec<W>, T)>,
}

impl<S: Store<W>, W, T> Disk<S, W, T> {
    /// A disk with this on it.
    pub fn new(durable: S) -> Self {
        Self {
            durable,
            pending: VecDeque::new(),
        }
    }

    /// What would be there after a power failure now.
    pub fn durable(&self) -> &S {
        &self.durable
    }

    /// Begins a transaction; [`sync_next`](Self::sync_next) is to be called once for each.
    pub fn begin(&mut self, writes: Vec<W>, then: T) {
        self.pending.push_back((writes, then));
    }

    /// Makes the oldest transaction durable.
    pub fn sync_next(&mut self) -> Option<(Vec<W>, T)> {
        let (writes, then) = self.pending.pop_front()?;
        for write in &writes {
            self.durable.apply(write);
        }
        Some((writes, then))
    }

    /// Power fails: the oldest `survivors` transactions have just become durable, the others never will. Gives the
    /// survivors' writes.
    pub fn crash(&mut self, survivors: usize) -> Vec<W> {
        self.pending.truncate(survivors);
        let survived: Vec<W> = self.pending.drain(..).flat_map(|(writes, _)| writes).collect();
        for write in &survived {
            self.durable.apply(write);
        }
        survived
    }

    /// Transactions under way.
    pub fn pending(&self) -> usize {
        self.pending.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Default)]
    struct Sum(Vec<u8>);

    impl Store<u8> for Sum {
        fn apply(&mut self, write: &u8) {
            self.0.push(*write);
        }
    }

    #[test]
    fn crash_forgets_all_but_a_prefix_of_what_was_not_synced() {
        let mut disk = Disk::new(Sum::default());
        for write in 1..=4 {
            disk.begin(vec![write, write * 10], ());
        }
        assert!(disk.durable().0.is_empty());
        assert!(disk.sync_next().is_some());
        assert_eq!(disk.crash(1), [2, 20]);
        assert_eq!(disk.durable().0, [1, 10, 2, 20]);
        assert_eq!((disk.pending(), disk.sync_next().is_none()), (0, true));
    }
}
