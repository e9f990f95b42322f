//! Requests that the `vhost` crate does not handle, and its errors.

use std::borrow::Cow;
use std::os::unix::net::UnixStream;
use std::sync::Mutex;

use vhost::vhost_user::Error;
use vhost::vhost_user::message::FrontendReq;

use crate::port::vhost::connection::Failure;
use crate::port::vhost::handler::{Device, DeviceError};
use crate::port::vhost::message::{Header, MessageError};
use crate::sync::lock;

/// Handles the requests that the `vhost` crate does not. Returns whether this was one of them.
pub(super) fn answer(header: Header, stream: &UnixStream, device: &Mutex<Device>) -> Result<bool, Failure> {
    let mut device = lock(device);
    let result = match header.request {
        FrontendReq::GET_STATUS => {
            header.take::<0>(stream)?;
            header.reply(stream, u64::from(device.status()))?;
            return Ok(true);
        }
        FrontendReq::SET_STATUS => device.set_status(number(header, stream)?),
        FrontendReq::NET_SET_MTU => device.frontend_mtu(number(header, stream)?),
        FrontendReq::SET_VRING_ENABLE => {
            let state = number(header, stream)?.to_ne_bytes();
            let word = |at: usize| u32::from_ne_bytes([state[at], state[at + 1], state[at + 2], state[at + 3]]);
            device.enable(word(0), word(4))
        }
        FrontendReq::SEND_RARP => {
            device.announce(number(header, stream)?);
            Ok(())
        }
        FrontendReq::SET_LOG_FD => header.take::<0>(stream).map(|_| Ok(()))?,
        FrontendReq::SET_VRING_ENDIAN => number(header, stream).map(|_| Err(DeviceError::Unsupported))?,
        _ => return Ok(false),
    };
    if header.need_reply && device.acknowledges() {
        header.reply(stream, u64::from(result.is_err()))?;
    }
    result.map(|()| true).map_err(|error| Failure::Device(header.request, error))
}

fn number(header: Header, stream: &UnixStream) -> Result<u64, MessageError> {
    Ok(u64::from_ne_bytes(header.take::<8>(stream)?))
}

/// The crate's errors in an operator's words.
pub(super) fn explain(error: Error) -> Cow<'static, str> {
    match error {
        Error::ReqHandlerError(error) => error.to_string().into(),
        Error::InvalidMessage => "cut short, or its size, fields or descriptors are not those of the request".into(),
        Error::InactiveOperation(feature) => format!("{feature:?} was not negotiated").into(),
        Error::SocketRetry(_) | Error::PartialMessage | Error::Disconnected => {
            "the frontend sent half a message".into()
        }
        other => other.to_string().into(),
    }
}
