//! Who listens on a TCP port of this host.

use std::collections::BTreeSet;

/// Inodes of the sockets that listen on a local port, IPv4 and IPv6, in this network namespace; empty where the kernel does not tell.
///
/// One that listened before a process was started is not that process's, so what answers there is another program.
pub fn listening(port: u16) -> BTreeSet<u64> {
    ["/proc/net/tcp", "/proc/net/tcp6"]
        .iter()
        .filter_map(|table| std::fs::read_to_string(table).ok())
        .flat_map(|table| inodes(&table, port))
        .collect()
}

/// The lines of `/proc/net/tcp` in state 0A: the second field is the local address, the tenth the inode.
fn inodes(table: &str, port: u16) -> Vec<u64> {
    let inode = |line: &str| -> Option<u64> {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        let (local, state, inode) = (fields.get(1)?, fields.get(3)?, fields.get(9)?);
        let (_, of) = local.rsplit_once(':')?;
        let wanted = *state == "0A" && u16::from_str_radix(of, 16).ok()? == port;
        inode.parse().ok().filter(|_| wanted)
    };
    table.lines().filter_map(inode).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listener_is_found_by_its_port_and_gone_with_it() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let found = listening(port);
        assert_eq!(found.len(), 1);
        drop(listener);
        // Somebody else may have got the port since.
        assert!(listening(port).is_disjoint(&found));
        assert!(inodes("nonsense\n", port).is_empty());
    }
}
