//! Mode `tcp`: bytes, both ways.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use tokio::io::copy_bidirectional_with_sizes;
use tokio::net::TcpStream;

use super::breaker::Ended;
use super::stream::IdleStream;
use super::{BUFFER_BYTES_MAX, Proxy, RETRY_PAUSE};

/// One client. Turned away, it finds its connection closed. Only what was refused is tried again: nothing was sent yet.
pub(super) async fn serve(proxy: Arc<Proxy>, client: TcpStream) {
    proxy.lock_retries().request();
    let (mut retried, mut patience) = (false, None);
    let (upstream, in_hand) = loop {
        let Ok(admitted) = proxy.admit(&mut patience).await else {
            return;
        };
        match proxy.connect().await {
            Ok(upstream) => break (upstream, admitted.end(Ended::Well)),
            Err(error) => {
                drop(admitted.end(Ended::Badly));
                let refused = error.kind() == std::io::ErrorKind::ConnectionRefused;
                if refused && !retried && proxy.may_retry() {
                    retried = true;
                    proxy.door.held_within(RETRY_PAUSE).await;
                    continue;
                }
                proxy.counts.failed.fetch_add(1, Ordering::Relaxed);
                return;
            }
        }
    };
    proxy.counts.answered.fetch_add(1, Ordering::Relaxed);
    let (mut client, mut upstream) = (IdleStream::new(client, proxy.spec.idle_timeout), upstream);
    let size = BUFFER_BYTES_MAX / 4;
    // Either end may end it as it likes; there is nobody to tell.
    drop(copy_bidirectional_with_sizes(&mut client, &mut upstream, size, size).await);
    drop(in_hand);
}
