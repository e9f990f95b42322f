//! Frames that may be anything, before every parser.

use sluice::frame::BurstStorage;
use sluice::limits::{MAX_FRAME, SNAPSHOT};
use sluice::mem::SourceSegment;
use sluice::wire::eth::EthernetHeader;
use sluice::wire::flow::flow_hash;
use sluice::wire::ip::Ip;
use sluice::wire::l4;
use sluice::wire::offload::{Csum, Offload, VirtioNetHdr};
use std::cell::RefCell;

thread_local! {
    static STORAGE: RefCell<BurstStorage> = RefCell::new(BurstStorage::default());
}

/// A virtio-net header and a frame.
pub(crate) fn run(data: &[u8]) {
    let Some((header, frame)) = data.split_first_chunk::<12>() else { return };
    parsers(frame);
    let headers = frame.get(..SNAPSHOT).unwrap_or(frame);
    if let Ok(offload) = Offload::from_virtio(&VirtioNetHdr::from_bytes(header), headers, frame.len()) {
        check(&offload, frame.len());
        let sent = offload.to_virtio(1);
        assert_eq!(Offload::from_virtio(&sent, headers, frame.len()).map(|again| again.gso), Ok(offload.gso));
    }
    STORAGE.with_borrow_mut(|storage| in_a_burst(storage, data, frame.len()));
}

fn parsers(frame: &[u8]) {
    let _ = flow_hash(frame);
    let Some(ethernet) = EthernetHeader::parse(frame) else {
        assert!(frame.len() < 22, "what has all headers can be parsed");
        return;
    };
    let l3 = usize::from(ethernet.l3_offset);
    assert!(l3 <= frame.len());
    let Some(ip) = Ip::parse(ethernet.ethertype, &frame[l3..]) else { return };
    let Some(transport) = ip.transport() else { return };
    let _ = l4::ports(&frame[l3..], transport);
    // Extension headers may say that it lies beyond the frame, as it does beyond a snapshot.
    let Some(segment) = frame.get(l3 + transport.offset..) else { return };
    if let Some(tcp) = l4::Tcp::parse(segment) {
        assert!(tcp.header_len() >= 20 && tcp.header_len() <= segment.len());
        let _ = (tcp.seq(), tcp.flags());
    }
}

/// What an offload promises of its frame.
fn check(offload: &Offload, len: usize) {
    if let Csum::Partial { start, offset } = offload.csum {
        assert!(start >= 14 && usize::from(start) + usize::from(offset) + 2 <= len);
    }
    if let Some(gso) = offload.gso {
        assert!(gso.size > 0 && matches!(offload.csum, Csum::Partial { .. }));
    }
}

fn in_a_burst(storage: &mut BurstStorage, data: &[u8], len: usize) {
    let mut burst = storage.begin();
    let mut frame = burst.start(12);
    let (one, two) = data.split_at(data.len() / 3);
    if !frame.push(SourceSegment::from_slice(one)) || !frame.push(SourceSegment::from_slice(two)) {
        return;
    }
    let admitted = frame.finish();
    assert_eq!(admitted.is_ok(), burst.count() == 1);
    if admitted.is_err() {
        return;
    }
    assert!(admitted == Ok(len) && len <= MAX_FRAME);
    let frame = burst.frame_mut(0);
    check(frame.offload(), len);
    let _ = ((frame.fits(1500), frame.longest()), frame.tag(), frame.source(), frame.destination());
    let before = (frame.len(), frame.tag(), frame.head().to_vec());
    frame.vid = 7;
    frame.set_tagged(true);
    assert_eq!(frame.tag().map(|tci| tci & 0xfff), Some(7));
    check(frame.offload(), frame.len());
    frame.set_tagged(false);
    // A tag that it came with is gone; else it is what it was.
    if before.1.is_none() && frame.tag().is_none() {
        assert_eq!((frame.len(), frame.head()), (before.0, before.2.as_slice()));
    }
    check(frame.offload(), frame.len());
    let _ = (frame.fits(1500), frame.longest());
}
