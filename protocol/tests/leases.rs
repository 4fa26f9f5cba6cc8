//! Slots of the fleet under everything that happens to messages, programs, hosts and clocks: never more holders than slots, by true time.
//!
//! `THERIAC_CASES` and `THERIAC_SEED` set how many histories and from which seed.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]
#![expect(clippy::print_stdout, reason = "a test says its seed")]

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::time::Duration;

use rand::{Rng as _, RngCore as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use theriac_protocol::fleet::{Borrower, Lender, RATE_ERROR_PPM, TTL_MAX};
use theriac_protocol::message::{LeaseKind, ToAggregator, ToEdge};
use theriac_protocol::units::{Moment, NodeId};

/// Microseconds of true time.
type Micros = u64;
const SECOND: Micros = 1_000_000;

/// What is to happen.
#[derive(Debug, Clone, PartialEq)]
enum Event {
    /// The edge looks after its slot.
    Tick(usize),
    ToLender(usize, ToAggregator),
    ToEdge(usize, ToEdge),
    /// The edge begins or stops to want a slot.
    Wish(usize),
    /// Its host is suspended, or its network is cut, for a while.
    Suspend(usize),
    Cut(usize),
    /// It loses its session, or its process dies as well.
    Reconnect(usize),
    Die(usize),
    /// The aggregator's process dies and another one comes, maybe with another term.
    Restart,
    /// Nodes come and go.
    Nodes,
}

/// A clock that runs fast or slow.
#[derive(Debug, Clone, Copy)]
struct Clock {
    ppm: i64,
    offset: Duration,
}

impl Clock {
    fn random(rng: &mut ChaCha8Rng) -> Self {
        let limit = i64::from(RATE_ERROR_PPM);
        let ppm = match rng.random_range(0..4) {
            0 => limit,
            1 => -limit,
            _ => rng.random_range(-limit..=limit),
        };
        let offset = Duration::from_secs(rng.random_range(0..100_000));
        Self { ppm, offset }
    }

    fn at(self, time: Micros) -> Duration {
        let rate = i128::from(1_000_000 + self.ppm);
        let told = i128::from(time) * rate / 1_000_000;
        self.offset + Duration::from_micros(u64::try_from(told).unwrap())
    }
}

struct Edge {
    clock: Clock,
    borrower: Borrower,
    wanted: Option<Duration>,
    suspended_until: Micros,
    cut_until: Micros,
}

struct World {
    rng: ChaCha8Rng,
    now: Micros,
    queue: BinaryHeap<Reverse<(Micros, u64)>>,
    events: BTreeMap<u64, Event>,
    numbers: u64,
    edges: Vec<Edge>,
    lender: Lender,
    lender_clock: Clock,
    /// Nobody hears what is sent to the aggregator before.
    lender_up: Micros,
    /// The longest term so far: what a lender leaves behind on the disk.
    longest: Duration,
    share: u8,
    nodes: usize,
    /// Nodes and the term never change, and some messages take no time at all: then no more hold a slot than there are now.
    steady: bool,
    /// When slots were lent, and how many there were then.
    lent: Vec<(Micros, usize)>,
    grants: usize,
    full: usize,
}

fn node(edge: usize) -> NodeId {
    NodeId::new(format!("n{edge}")).unwrap()
}

impl World {
    fn new(seed: u64, steady: bool) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let edges: Vec<Edge> = (0..rng.random_range(2..8))
            .map(|_| Edge {
                clock: Clock::random(&mut rng),
                borrower: Borrower::new(LeaseKind::Action, 100),
                wanted: None,
                suspended_until: 0,
                cut_until: 0,
            })
            .collect();
        let lender_clock = Clock::random(&mut rng);
        let ttl = Duration::from_secs(rng.random_range(30..70));
        let share = rng.random_range(1..60);
        let mut world = Self {
            now: 0,
            queue: BinaryHeap::new(),
            events: BTreeMap::new(),
            numbers: 0,
            nodes: edges.len(),
            edges,
            lender: Lender::new(
                Moment(lender_clock.at(0)),
                ttl,
                share,
                Duration::ZERO,
                rng.next_u64(),
            ),
            lender_clock,
            lender_up: 0,
            longest: ttl,
            share,
            steady,
            lent: Vec::new(),
            grants: 0,
            full: 0,
            rng,
        };
        for edge in 0..world.edges.len() {
            world.after(0, Event::Tick(edge));
            world.later(10, Event::Wish(edge));
            world.later(300, Event::Suspend(edge));
            world.later(200, Event::Cut(edge));
            world.later(300, Event::Reconnect(edge));
            world.later(400, Event::Die(edge));
        }
        world.later(900, Event::Restart);
        if !steady {
            world.later(300, Event::Nodes);
        }
        world
    }

    fn after(&mut self, span: Micros, event: Event) {
        self.numbers += 1;
        self.events.insert(self.numbers, event);
        self.queue.push(Reverse((self.now + span, self.numbers)));
    }

    /// Within so many seconds.
    fn later(&mut self, seconds: u64, event: Event) {
        let span = self.rng.random_range(0..seconds * SECOND);
        self.after(span, event);
    }

    /// A message: on time, late, very late, twice, or never.
    fn send(&mut self, edge: usize, event: &Event) {
        let copies = match self.rng.random_range(0..20) {
            0..3 => 0,
            3 => 2,
            _ => 1,
        };
        for _ in 0..copies {
            let span = match self.rng.random_range(0..20) {
                0..9 if self.steady => 0,
                0..12 => self.rng.random_range(0..SECOND / 5),
                12..18 => self.rng.random_range(0..8 * SECOND),
                _ => self.rng.random_range(0..120 * SECOND),
            };
            // A cut network holds some messages back and loses the others.
            let cut = self.edges[edge].cut_until.saturating_sub(self.now);
            if cut == 0 || self.rng.random_bool(0.5) {
                self.after(cut + span, event.clone());
            }
        }
    }

    fn run(&mut self, until: Micros) {
        while let Some(Reverse((at, number))) = self.queue.pop() {
            if at > until {
                break;
            }
            self.now = at;
            let event = self.events.remove(&number).unwrap();
            self.happens(event);
            self.nobody_too_many();
        }
    }

    fn happens(&mut self, event: Event) {
        if let Event::Tick(edge) | Event::Wish(edge) | Event::ToEdge(edge, _) = event
            && self.edges[edge].suspended_until > self.now
        {
            let left = self.edges[edge].suspended_until - self.now;
            return self.after(left, event);
        }
        match event {
            Event::Tick(edge) => {
                self.look_after(edge);
                self.after(SECOND, Event::Tick(edge));
            }
            Event::Wish(edge) => {
                let need = self.rng.random_range(1..20);
                let wanted = match self.edges[edge].wanted {
                    Some(_) => None,
                    None => Some(Duration::from_secs(need)),
                };
                self.edges[edge].wanted = wanted;
                self.edges[edge].borrower.want(wanted);
                self.look_after(edge);
                self.later(60, Event::Wish(edge));
            }
            Event::ToLender(edge, message) => self.lender_hears(edge, &message),
            Event::ToEdge(edge, message) => {
                let now = self.edges[edge].clock.at(self.now);
                let borrower = &mut self.edges[edge].borrower;
                match message {
                    ToEdge::LeaseGranted(granted) => borrower.granted(&granted),
                    ToEdge::LeaseRefused(refused) => borrower.refused(now, &refused),
                    other => panic!("{other:?}"),
                }
                self.look_after(edge);
            }
            Event::Suspend(edge) => {
                self.edges[edge].suspended_until = self.now + self.rng.random_range(0..200 * SECOND);
                self.later(600, Event::Suspend(edge));
            }
            Event::Cut(edge) => {
                self.edges[edge].cut_until = self.now + self.rng.random_range(0..100 * SECOND);
                self.later(400, Event::Cut(edge));
            }
            Event::Reconnect(edge) => {
                self.edges[edge].borrower.disconnected();
                self.later(300, Event::Reconnect(edge));
            }
            Event::Die(edge) => {
                let mut borrower = Borrower::new(LeaseKind::Action, 100);
                borrower.want(self.edges[edge].wanted);
                self.edges[edge].borrower = borrower;
                self.later(600, Event::Die(edge));
            }
            Event::Restart => {
                self.lender_up = self.now + self.rng.random_range(0..20 * SECOND);
                self.lender_clock = Clock::random(&mut self.rng);
                let ttl = if self.steady {
                    self.longest
                } else {
                    Duration::from_secs(self.rng.random_range(30..70))
                };
                let started = Moment(self.lender_clock.at(self.now));
                self.lender = Lender::new(started, ttl, self.share, self.longest, self.rng.next_u64());
                self.longest = self.longest.max(ttl);
                self.later(1_800, Event::Restart);
            }
            Event::Nodes => {
                self.nodes = self.rng.random_range(1..=2 * self.edges.len());
                self.later(300, Event::Nodes);
            }
        }
    }

    /// What the edge's link does once a second and after each message.
    fn look_after(&mut self, edge: usize) {
        let now = self.edges[edge].clock.at(self.now);
        loop {
            let number = self.rng.next_u64();
            let Some(message) = self.edges[edge].borrower.poll(now, || number) else {
                return;
            };
            self.send(edge, &Event::ToLender(edge, message));
        }
    }

    fn lender_hears(&mut self, edge: usize, message: &ToAggregator) {
        if self.now < self.lender_up {
            return;
        }
        let now = Moment(self.lender_clock.at(self.now));
        let answer = match message {
            ToAggregator::LeaseRequest(asked) => {
                match self.lender.request(now, &node(edge), asked, self.nodes) {
                    Ok(granted) => {
                        self.grants += 1;
                        self.lent
                            .push((self.now, self.lender.slots(self.nodes, asked.share)));
                        ToEdge::LeaseGranted(granted)
                    }
                    Err(refused) => ToEdge::LeaseRefused(refused),
                }
            }
            ToAggregator::LeaseRelease(said) => {
                self.lender.release(now, &node(edge), *said);
                return;
            }
            other => panic!("{other:?}"),
        };
        self.send(edge, &Event::ToEdge(edge, answer));
    }

    /// Also those that are suspended: their clocks run on, and they may wake up at any moment.
    fn nobody_too_many(&mut self) {
        let holds = |edge: &&Edge| edge.borrower.lease(edge.clock.at(self.now)).is_some();
        let holders = self.edges.iter().filter(holds).count();
        let term = u64::try_from(self.longest.as_micros()).unwrap();
        let since = self.now.saturating_sub(term);
        self.lent.retain(|(at, _)| *at >= since);
        let slots = self.lent.iter().map(|(_, slots)| *slots).max().unwrap_or(0);
        assert!(!self.steady || slots <= self.lender.slots(self.nodes, 100));
        assert!(
            holders <= slots,
            "{holders} holders of {slots} slots at {} us",
            self.now
        );
        self.full += usize::from(holders > 0 && holders == slots);
    }
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap())
}

#[test]
fn there_are_never_more_holders_than_slots_by_true_time() {
    histories(false);
}

#[test]
fn where_nodes_and_term_stay_there_are_never_more_holders_than_there_are_slots_now() {
    histories(true);
}

fn histories(steady: bool) {
    let (cases, seed) = (number("THERIAC_CASES", 100), number("THERIAC_SEED", 1));
    println!("{cases} histories from seed {seed}");
    let (mut grants, mut full) = (0, 0);
    for case in 0..cases {
        let own = seed.wrapping_mul(1_000_003).wrapping_add(case);
        let mut world = World::new(own, steady);
        let run = std::panic::AssertUnwindSafe(|| world.run(3_600 * SECOND));
        if let Err(found) = std::panic::catch_unwind(run) {
            println!("seed {own}");
            std::panic::resume_unwind(found);
        }
        grants += world.grants;
        full += world.full;
    }
    println!("{grants} grants, every slot held at {full} moments");
    assert!(
        grants as u64 > 20 * cases && full as u64 > 20 * cases,
        "{grants} {full}"
    );
}

#[test]
fn a_term_beyond_the_longest_is_not_counted_on() {
    let mut borrower = Borrower::new(LeaseKind::Action, 20);
    borrower.want(Some(Duration::from_secs(1)));
    let Some(ToAggregator::LeaseRequest(asked)) = borrower.poll(Duration::ZERO, || 1) else {
        panic!("nothing was asked")
    };
    borrower.granted(&theriac_protocol::message::LeaseGrantedV1 {
        request: asked.request,
        kind: LeaseKind::Action,
        lease: 1,
        ttl_ms: u32::MAX,
    });
    assert_eq!(borrower.lease(TTL_MAX), None);
}
