//! Faults in the service's own process: memory that really grows, threads that really spin.

use std::hint::black_box;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Most memory that a leak takes: the fault must not take the host with it.
pub(super) const LEAK_MIB_MAX: usize = 1024;
/// Fastest leak.
pub(super) const LEAK_MIB_PER_S_MAX: u32 = 256;
/// Most spinning threads.
pub(super) const CPU_THREADS_MAX: u32 = 16;

/// The fault that is on. Cheap to copy.
#[derive(Debug, Clone, Default)]
pub(super) struct Faults {
    /// Ends the threads of the fault that is on.
    on: Arc<Mutex<Option<Arc<AtomicBool>>>>,
}

impl Faults {
    /// Allocates and touches so much memory every second, up to [`LEAK_MIB_MAX`].
    ///
    /// # Errors
    /// The system's, when no thread can be started.
    pub(super) fn leak(&self, mib_per_s: u32) -> std::io::Result<()> {
        let on = self.switch();
        std::thread::Builder::new()
            .name("leak".to_owned())
            .spawn(move || {
                let mut held: Vec<Vec<u8>> = Vec::new();
                let steps_per_s = 10;
                let step = (mib_per_s as usize * (1 << 20)) / steps_per_s;
                while on.load(Ordering::Relaxed) {
                    let total: usize = held.iter().map(Vec::len).sum();
                    if total + step <= LEAK_MIB_MAX << 20 {
                        let mut block = vec![0_u8; step];
                        // Each page has to be written to, or it would take no memory.
                        block.iter_mut().step_by(4096).for_each(|byte| *byte = 1);
                        held.push(black_box(block));
                    }
                    std::thread::sleep(Duration::from_millis(1000 / steps_per_s as u64));
                }
            })?;
        Ok(())
    }

    /// Spins in so many threads.
    ///
    /// # Errors
    /// The system's, when no thread can be started.
    pub(super) fn cpu(&self, threads: u32) -> std::io::Result<()> {
        let on = self.switch();
        for thread in 0..threads {
            let on = Arc::clone(&on);
            std::thread::Builder::new()
                .name(format!("spin-{thread}"))
                .spawn(move || {
                    let mut number = u64::from(thread) + 1;
                    while on.load(Ordering::Relaxed) {
                        for _ in 0..100_000 {
                            number =
                                black_box(number.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1));
                        }
                    }
                })?;
        }
        Ok(())
    }

    /// Ends the fault that is on; leaked memory is given back.
    pub(super) fn none(&self) {
        drop(self.switch());
    }

    /// Ends the present fault and gives the switch of the next one.
    fn switch(&self) -> Arc<AtomicBool> {
        let next = Arc::new(AtomicBool::new(true));
        let mut on = self.on.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(former) = on.replace(Arc::clone(&next)) {
            former.store(false, Ordering::Relaxed);
        }
        next
    }
}
