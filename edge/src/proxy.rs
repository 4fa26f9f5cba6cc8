//! Runs the proxy before one service and tells what it does.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use theriac_heal::executor::proxy::{Circuit, Proxy};
use tokio::net::TcpListener;
use tokio::time::MissedTickBehavior;

use crate::metrics::{outcome, raise_to, service as label};
use crate::service::ServiceContext;
use crate::supervise::Shutdown;

/// Time between two looks for a person's word, and two tellings.
const TELL_EVERY: Duration = Duration::from_millis(500);
/// Longest time for what is in hand when the edge ends; shorter than the tasks' own.
const GRACE: Duration = Duration::from_secs(5);

/// The proxy as `/status` shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProxyStatus {
    /// Where clients connect.
    pub listen: SocketAddr,
    /// Whether the service is asked: `closed` (it is), `half_open`, `open`.
    pub circuit: String,
    /// Whether new requests are turned away.
    pub draining: bool,
    /// Whether they wait for the service to restart.
    pub holding: bool,
    /// Requests, or connections, in hand.
    pub in_hand: u64,
    /// Answered by the service.
    pub answered: u64,
    /// Not answered by it.
    pub failed: u64,
    /// Turned away: draining, circuit open, too many connections.
    pub turned_away: u64,
    /// Asked a second time.
    pub retries: u64,
    /// Held back while the service restarted.
    pub held: u64,
}

/// Serves until the signal to stop.
///
/// # Errors
/// Never; the signature is the one of a task.
pub async fn run(
    context: ServiceContext,
    proxy: Arc<Proxy>,
    listener: Arc<TcpListener>,
    shutdown: Shutdown,
) -> Result<(), Infallible> {
    let listen = listener.local_addr().ok();
    let mut stop = shutdown.clone();
    tokio::select! {
        () = Arc::clone(&proxy).serve(listener, GRACE, stop.wait()) => {}
        () = tell_again_and_again(&context, &proxy, listen) => {}
    }
    Ok(())
}

async fn tell_again_and_again(context: &ServiceContext, proxy: &Proxy, listen: Option<SocketAddr>) {
    let name = &context.shared.name;
    let order = context.dir.drain_file(name);
    let mut ticks = tokio::time::interval(TELL_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut ordered = false;
    loop {
        ticks.tick().await;
        let wanted = order.exists();
        if wanted != ordered {
            tracing::warn!(service = name, drained = wanted, "a person's word to the proxy");
            ordered = wanted;
        }
        proxy.order_drained(wanted);
        tell(context, proxy, listen);
    }
}

fn tell(context: &ServiceContext, proxy: &Proxy, listen: Option<SocketAddr>) {
    let (name, metrics, counts) = (&context.shared.name, &context.metrics, proxy.counts());
    for (word, total) in [
        ("answered", counts.answered),
        ("failed", counts.failed),
        ("drained", counts.drained),
        ("circuit_open", counts.broken),
        ("crowded", counts.crowded),
    ] {
        raise_to(&metrics.proxy_requests.get_or_create(&outcome(name, word)), total);
    }
    raise_to(&metrics.proxy_retries.get_or_create(&label(name)), counts.retries);
    raise_to(&metrics.proxy_held.get_or_create(&label(name)), counts.held);
    let in_hand = proxy.in_hand() as u64;
    let gauge = i64::try_from(in_hand).unwrap_or(i64::MAX);
    metrics.proxy_in_hand.get_or_create(&label(name)).set(gauge);
    let (circuit, number) = match proxy.circuit() {
        Circuit::Closed => ("closed", 0),
        Circuit::HalfOpen => ("half_open", 1),
        Circuit::Open => ("open", 2),
    };
    metrics.proxy_circuit.get_or_create(&label(name)).set(number);
    let Some(listen) = listen else { return };
    let status = ProxyStatus {
        listen,
        circuit: circuit.to_owned(),
        draining: proxy.is_draining(),
        holding: proxy.is_holding(),
        in_hand,
        answered: counts.answered,
        failed: counts.failed,
        turned_away: counts.drained + counts.broken + counts.crowded,
        retries: counts.retries,
        held: counts.held,
    };
    context
        .board
        .update_service(name, |line| line.proxy = Some(status));
}
