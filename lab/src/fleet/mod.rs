//! A small federation of real processes on this machine, seen from outside: what the demo, the campaign and the load
//! measurement share.

pub mod fault;
pub mod http;
pub mod lifeline;
pub mod place;
pub mod process;
pub mod status;

use std::io;
use std::net::{SocketAddr, TcpListener, UdpSocket};

use tokio::sync::watch;

/// Addresses on loopback that were free a moment ago, of TCP and of UDP, each port different.
///
/// # Errors
/// When the system has no free port left.
pub fn free_addresses(count: usize) -> io::Result<Vec<SocketAddr>> {
    let mut held: Vec<(TcpListener, UdpSocket)> = Vec::with_capacity(count);
    let mut tries = 0;
    while held.len() < count {
        tries += 1;
        let tcp = TcpListener::bind((std::net::Ipv4Addr::LOCALHOST, 0))?;
        match UdpSocket::bind(tcp.local_addr()?) {
            Ok(udp) => held.push((tcp, udp)),
            Err(error) if tries > count * 10 => return Err(error),
            Err(_) => {} // the port is taken for UDP: draw another
        }
    }
    // All are held until the last is drawn, so that no two are the same.
    held.iter().map(|(tcp, _)| tcp.local_addr()).collect()
}

/// Turns true at Ctrl-C, TERM or the end of the terminal. Call it within a runtime.
pub(crate) fn interruption() -> watch::Receiver<bool> {
    use tokio::signal::unix::{SignalKind, signal};
    let (tell, interrupted) = watch::channel(false);
    for kind in [
        SignalKind::interrupt(),
        SignalKind::terminate(),
        SignalKind::hangup(),
    ] {
        // Without the handler the signal has its ordinary effect and the lifelines end the others.
        let Ok(mut stream) = signal(kind) else { continue };
        let tell = tell.clone();
        tokio::spawn(async move {
            if stream.recv().await.is_some() {
                tell.send_replace(true);
            }
        });
    }
    interrupted
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn free_addresses_are_different_and_can_be_bound() {
        let addresses = free_addresses(12).unwrap();
        let ports: std::collections::BTreeSet<u16> = addresses.iter().map(SocketAddr::port).collect();
        assert_eq!(ports.len(), 12);
        assert!(addresses.iter().all(|address| TcpListener::bind(address).is_ok()));
    }
}
