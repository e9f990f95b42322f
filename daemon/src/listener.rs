//! Where a process listens for those who watch over it.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};

use rustix::io::Errno;

/// Listens there, without blocking. All addresses, `[::]`, are all of IPv4 on a machine that has no IPv6 (`ipv6.disable=1`).
///
/// # Errors
/// If the address is taken, or not ours.
pub fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let listener = bind(address, TcpListener::bind)?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Whether what listens there can be what [`listen`] gave for the address.
pub fn is_wanted(at: SocketAddr, wanted: SocketAddr) -> bool {
    let is_all = |ip: IpAddr| ip.is_ipv4() && ip.is_unspecified();
    let without_ipv6 = is_all(at.ip()) && wanted.is_ipv6() && wanted.ip().is_unspecified();
    // Whoever asks for any port is content with the one there is.
    (at.ip() == wanted.ip() || without_ipv6) && (at.port() == wanted.port() || wanted.port() == 0)
}

fn bind<L>(address: SocketAddr, bind: impl Fn(SocketAddr) -> io::Result<L>) -> io::Result<L> {
    match bind(address) {
        Err(error) if is_without_ipv6(&error) && address.is_ipv6() && address.ip().is_unspecified() => {
            bind(SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), address.port()))
        }
        other => other,
    }
}

fn is_without_ipv6(error: &io::Error) -> bool {
    Errno::from_io_error(error) == Some(Errno::AFNOSUPPORT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_addresses_are_those_there_are() {
        let without_ipv6 =
            |address: SocketAddr| if address.is_ipv6() { Err(Errno::AFNOSUPPORT.into()) } else { Ok(address) };
        let try_at = |address: &str| bind(address.parse().unwrap(), without_ipv6);
        assert_eq!(try_at("[::]:9471").unwrap(), "0.0.0.0:9471".parse().unwrap());
        assert_eq!(try_at("127.0.0.1:1").unwrap(), "127.0.0.1:1".parse().unwrap());
        assert!(try_at("[::1]:9471").is_err(), "one address is not all");
        let taken = |_: SocketAddr| -> io::Result<()> { Err(Errno::ADDRINUSE.into()) };
        assert!(bind("[::]:9471".parse().unwrap(), taken).is_err());
    }

    #[test]
    fn a_listener_that_is_there_may_be_the_wanted_one() {
        let wanted = |at: &str, wanted: &str| is_wanted(at.parse().unwrap(), wanted.parse().unwrap());
        assert!(wanted("127.0.0.1:9471", "127.0.0.1:9471") && wanted("127.0.0.1:9471", "127.0.0.1:0"));
        assert!(wanted("0.0.0.0:9471", "[::]:9471"), "there is no IPv6");
        assert!(!wanted("[::]:9471", "0.0.0.0:9471"), "that would be more than what was asked for");
        assert!(!wanted("127.0.0.1:9471", "127.0.0.1:9472") && !wanted("127.0.0.1:9471", "[::]:9471"));
    }
}
