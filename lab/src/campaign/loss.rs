//! Packets that really get lost: a classifier on the loopback interface drops a random share of those from and to one port.
//!
//! `netem` and `nftables` are not everywhere; the classifier `bpf` of `tc` takes a program of the classic packet filter, which can ask the
//! kernel for a random number (`SKF_AD_RANDOM`), and whose result it does as it says (`direct-action`). What is dropped is then sent again
//! by TCP, as on any lossy line.

use std::io;
use std::path::Path;
use std::process::Command;

use super::undo::FOLDER;

/// Of a thousand packets so many are dropped, each way.
const DROPPED: u64 = 400;

/// A filter that drops; it is there until it is taken back by [`Loss::undo`] or, all of a campaign, by [`undo_all`].
#[derive(Debug, Clone, Copy)]
pub(super) struct Loss {
    priority: u16,
    port: u16,
}

impl Loss {
    /// Begins to drop what comes from and goes to `port` of this host.
    pub(super) fn bring(root: &Path, port: u16) -> io::Result<Self> {
        let priority = priority(root).ok_or_else(|| io::Error::other("the folder's name gives no number"))?;
        // There already is as good.
        tc(&["qdisc", "add", "dev", "lo", "clsact"]).ok();
        let (number, handle) = (priority.to_string(), port.to_string());
        tc(&[
            "filter",
            "add",
            "dev",
            "lo",
            "ingress",
            "protocol",
            "ip",
            "pref",
            &number,
            "handle",
            &handle,
            "bpf",
            "da",
            "bytecode",
            &program(port),
        ])?;
        Ok(Self { priority, port })
    }

    /// Drops nothing more.
    pub(super) fn undo(self) -> io::Result<()> {
        let (number, handle) = (self.priority.to_string(), self.port.to_string());
        tc(&[
            "filter", "del", "dev", "lo", "ingress", "protocol", "ip", "pref", &number, "handle", &handle,
            "bpf",
        ])
    }
}

/// Takes every filter of a campaign's folder back, and what carried them where no other is left on it.
pub(super) fn undo_all(root: &Path) -> io::Result<()> {
    let Some(priority) = priority(root) else {
        return Ok(());
    };
    if !super::fault::is_on_path("tc") {
        return Ok(());
    }
    let number = priority.to_string();
    let one = ["filter", "show", "dev", "lo", "ingress", "pref", &number];
    if !shown(&one)?.is_empty() {
        tc(&["filter", "del", "dev", "lo", "ingress", "pref", &number])?;
    }
    let is_bare =
        |way: &str| shown(&["filter", "show", "dev", "lo", way]).is_ok_and(|filters| filters.is_empty());
    if is_bare("ingress") && is_bare("egress") {
        // Not there, or somebody else's filter came meanwhile: it is no trouble when it stays.
        tc(&["qdisc", "del", "dev", "lo", "clsact"]).ok();
    }
    Ok(())
}

/// Whether packets can be dropped here: a filter for nobody's port is laid and taken back.
pub(super) fn is_possible() -> Result<(), String> {
    if !super::fault::is_on_path("tc") {
        return Err("`tc` is not on PATH".to_owned());
    }
    let unique: u32 = rand::random();
    let root = Path::new("/").join(format!("{FOLDER}{unique:08x}"));
    let tried = Loss::bring(&root, 1).and_then(Loss::undo);
    undo_all(&root).ok();
    tried.map_err(|error| format!("no packets can be dropped on loopback: {error}"))
}

/// The filters' priority: the last digits of the folder's random name, so that whoever knows the folder finds them.
fn priority(root: &Path) -> Option<u16> {
    let name = root.file_name()?.to_str()?.strip_prefix(FOLDER)?;
    let digits = name.get(name.len().checked_sub(4)?..)?;
    u16::from_str_radix(digits, 16).ok().map(|number| number.max(1))
}

/// The classic filter: of IPv4 TCP packets whose source or destination port is `port`, a random share is dropped (`TC_ACT_SHOT`), all others
/// go on (`TC_ACT_UNSPEC`). Offsets are from the network header; the header is 20 bytes long on loopback.
fn program(port: u16) -> String {
    const NETWORK: u32 = 0xfff0_0000;
    const RANDOM: u32 = 0xffff_f038;
    let lets_through = (u64::from(u32::MAX) * DROPPED / 1_000).to_string();
    let lines = [
        format!("48 0 0 {}", NETWORK + 9),
        "21 0 7 6".to_owned(),
        format!("40 0 0 {}", NETWORK + 20),
        format!("21 2 0 {port}"),
        format!("40 0 0 {}", NETWORK + 22),
        format!("21 0 3 {port}"),
        format!("32 0 0 {RANDOM}"),
        format!("53 1 0 {lets_through}"),
        "6 0 0 2".to_owned(),
        "6 0 0 4294967295".to_owned(),
    ];
    format!("{},{}", lines.len(), lines.join(","))
}

fn tc(words: &[&str]) -> io::Result<()> {
    shown(words).map(drop)
}

fn shown(words: &[&str]) -> io::Result<String> {
    let out = Command::new("tc").args(words).output()?;
    if out.status.success() {
        return Ok(String::from_utf8_lossy(&out.stdout).trim().to_owned());
    }
    let said = String::from_utf8_lossy(&out.stderr);
    Err(io::Error::other(format!(
        "tc {}: {}",
        words.join(" "),
        said.trim()
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_campaigns_filters_are_found_by_its_folder_alone() {
        let of = |name: &str| priority(Path::new(name));
        assert_eq!(of("/tmp/theriac-campaign-00000000000012ab"), Some(0x12ab));
        assert_eq!(of("/tmp/theriac-campaign-0000000000000000"), Some(1));
        assert_eq!(of("/tmp/theriac-campaign-x"), None);
        assert_eq!(of("/tmp/other-12ab"), None);
        assert!(program(6_379).starts_with("10,48 0 0 4293918729,21 0 7 6,"));
    }

    #[test]
    fn a_share_of_one_ports_packets_is_lost_and_none_once_it_is_taken_back() {
        if !rustix::process::geteuid().is_root() {
            eprintln!("left out: this account may lay no filters");
            return;
        }
        if let Err(why) = is_possible() {
            eprintln!("left out: {why}");
            return;
        }
        let unique: u64 = rand::random();
        let root = Path::new("/tmp").join(format!("{FOLDER}{unique:016x}"));
        let (lossy, sound) = (listener(), listener());
        let port = |of: &std::net::TcpListener| of.local_addr().unwrap().port();
        let loss = Loss::bring(&root, port(&lossy)).unwrap();
        let resent = || {
            let text = std::fs::read_to_string("/proc/net/snmp").unwrap();
            let line = text.lines().rfind(|line| line.starts_with("Tcp:")).unwrap();
            line.split(' ').nth(12).unwrap().parse::<u64>().unwrap()
        };
        let before = resent();
        for _ in 0..40 {
            // Each of them takes as long as it takes to be sent again.
            std::net::TcpStream::connect_timeout(&lossy.local_addr().unwrap(), PATIENCE).ok();
        }
        assert!(
            resent() > before,
            "40 connections, 40 % of the packets dropped, none sent again"
        );
        for _ in 0..40 {
            std::net::TcpStream::connect_timeout(&sound.local_addr().unwrap(), LONG).unwrap();
        }
        loss.undo().unwrap();
        undo_all(&root).unwrap();
        for _ in 0..40 {
            std::net::TcpStream::connect_timeout(&lossy.local_addr().unwrap(), LONG).unwrap();
        }
    }

    const PATIENCE: std::time::Duration = std::time::Duration::from_millis(150);
    const LONG: std::time::Duration = std::time::Duration::from_mins(1);

    fn listener() -> std::net::TcpListener {
        std::net::TcpListener::bind("127.0.0.1:0").unwrap()
    }
}
