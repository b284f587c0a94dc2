//! How a worker waits: spinning, or spinning a while and then sleeping on its peers' bells (R8).
//!
//! Waking a sleeper on another core costs it 20 µs and the waker 6 µs, so it spins well past that
//! first; less when there are more workers than cores, since then the spinning takes the core from
//! whoever has the work.
//!
//! Called by the step loop when a step found nothing to do.

use super::context::Cx;
use crate::config::Idle;
use crate::time::now_ns;
use std::time::Duration;
use testudo_shm::primitive::{AtomicU32, Ordering, spin_hint};
use testudo_shm::wait::{self, FUTEX_WAITV_MAX, WaitWord};

/// Another process of the job, as far as waiting goes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Peer {
    pub(crate) bell: &'static AtomicU32,
    pub(crate) sleeping: &'static AtomicU32,
    /// Its eventfd, where the kernel cannot wait on words.
    pub(crate) event: Option<i32>,
}

/// Nanoseconds of spinning before the first sleep, with a core of one's own.
const SPIN_NS: u64 = 100_000;

/// The same where workers share cores.
const SPIN_SHARED_NS: u64 = 5_000;

#[derive(Debug)]
pub(crate) struct Waiter {
    idle: Idle,
    spin_ns: u64,
    own: usize,
    since: Option<u64>,
    values: Vec<u32>,
}

impl Waiter {
    pub(crate) fn new(idle: Idle, own: usize, shares_core: bool) -> Self {
        let spin_ns = if shares_core { SPIN_SHARED_NS } else { SPIN_NS };
        Self { idle, spin_ns, own, since: None, values: Vec::new() }
    }

    /// The step did something.
    #[inline]
    pub(crate) fn reset(&mut self) {
        self.since = None;
    }

    /// The step did nothing: spins once, or sleeps. `due_ns` is when a source wants to be called
    /// again.
    pub(crate) fn wait(
        &mut self,
        cx: &mut Cx,
        peers: &[Peer],
        sleeping: &AtomicU32,
        event: Option<i32>,
        due_ns: Option<u64>,
        control_changed: impl Fn() -> bool,
    ) {
        let now = now_ns();
        let since = *self.since.get_or_insert(now);
        let soon = due_ns.is_some_and(|due| due < now + self.spin_ns);
        if self.idle == Idle::Spin || soon || now - since < self.spin_ns {
            for _ in 0..8 {
                spin_hint();
            }
            return;
        }
        let longest = cx.patience();
        let until_due = due_ns.map_or(longest, |due| {
            Duration::from_nanos(due.saturating_sub(now).saturating_sub(self.spin_ns / 2))
                .min(longest)
        });
        self.values.clear();
        self.values.extend(peers.iter().map(|peer| peer.bell.load(Ordering::Acquire)));
        wait::announce(sleeping);
        if !cx.has_new_input() && !cx.has_room_again() && !control_changed() {
            self.sleep(peers, event, until_due);
        }
        wait::awake(sleeping);
    }

    fn sleep(&self, peers: &[Peer], event: Option<i32>, timeout: Duration) {
        if let Some(event) = event {
            wait::wait_event(event, Some(timeout));
            return;
        }
        let others = peers.iter().zip(&self.values).enumerate().filter(|(i, _)| *i != self.own);
        let words: Vec<WaitWord<'_>> = others
            .take(FUTEX_WAITV_MAX)
            .map(|(_, (peer, value))| WaitWord { word: peer.bell, value: *value })
            .collect();
        wait::wait_any(&words, Some(timeout));
    }
}

/// Wakes the peers that were published to and sleep. After `wait::publish_fence`.
pub(crate) fn wake_sleepers(peers: &[Peer], touched: &[usize], own_bell: &AtomicU32) {
    let mut rung = false;
    for &peer in touched {
        let peer = &peers[peer];
        if wait::must_wake(peer.sleeping) {
            match peer.event {
                Some(event) => wait::wake_event(event),
                None if !rung => {
                    wait::ring_bell(own_bell);
                    rung = true;
                }
                None => {}
            }
        }
    }
}
