//! Reverse ARP requests, by which a station that has moved makes itself known to bridges (RFC 903; QEMU sends the same).

/// Length of the shortest Ethernet frame, without its checksum.
const LEN: usize = 60;

/// A broadcast request for the address of `mac`, from `mac`.
pub fn request(mac: [u8; 6]) -> [u8; LEN] {
    let mut frame = [0; LEN];
    // Ethertype; Ethernet and IPv4 addresses, of 6 and 4 bytes; a reverse request.
    const FIXED: [u8; 10] = [0x80, 0x35, 0, 1, 0x08, 0x00, 6, 4, 0, 3];
    frame[..6].copy_from_slice(&[0xff; 6]);
    frame[6..12].copy_from_slice(&mac);
    frame[12..22].copy_from_slice(&FIXED);
    // Sender and target are the same; their IPv4 addresses are unknown.
    frame[22..28].copy_from_slice(&mac);
    frame[32..38].copy_from_slice(&mac);
    frame
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_what_qemu_sends() {
        let frame = request([2, 0, 0, 0, 0, 9]);
        let expected = [
            255, 255, 255, 255, 255, 255, 2, 0, 0, 0, 0, 9, 0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3, 2, 0, 0, 0, 0, 9, 0, 0,
            0, 0, 2, 0, 0, 0, 0, 9, 0, 0, 0, 0,
        ];
        assert_eq!(frame[..42], expected);
        assert!(frame[42..].iter().all(|byte| *byte == 0));
    }
}
