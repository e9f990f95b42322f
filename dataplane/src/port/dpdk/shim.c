/*
 * What the switch needs of DPDK, as plain functions: most of DPDK's own are inline, and its structures are not for
 * other languages to know. Numbers below 0 are negative errno.
 */
#include <errno.h>
#include <pthread.h>
#include <stdbool.h>
#include <string.h>

#include <rte_dev.h>
#include <rte_eal.h>
#include <rte_errno.h>
#include <rte_ethdev.h>
#include <rte_ether.h>
#include <rte_mbuf.h>

enum { DESCRIPTORS = 1024, SPARE = 512, PIECES = 64 };

struct sl_port {
	struct rte_mempool *pool;
	uint16_t id;
	uint16_t queues;
	uint16_t mtu;
	uint16_t room; /* bytes of the longest frame that one buffer holds */
	char driver[32];
};

/* Ports that are ours: a device has several names, and whoever asks by another one gets the same port. */
static bool is_open[RTE_MAX_ETHPORTS];
static pthread_mutex_t opening = PTHREAD_MUTEX_INITIALIZER;

struct sl_piece {
	const void *data;
	size_t len;
};

int sl_init(int argc, char **argv)
{
	return rte_eal_init(argc, argv) < 0 ? -rte_errno : 0;
}

static int find(const char *device, uint16_t *id)
{
	struct rte_dev_iterator iterator;

	RTE_ETH_FOREACH_MATCHING_DEV(*id, device, &iterator) {
		rte_eth_iterator_cleanup(&iterator);
		return 0;
	}
	return -ENODEV;
}

/* Sets queues and MTU; `mtu` 0 leaves the device's own, and one that it does not take is -ERANGE. */
static int configure(struct sl_port *port, const struct rte_eth_dev_info *info, uint16_t mtu)
{
	const uint64_t flows = RTE_ETH_RSS_IP | RTE_ETH_RSS_TCP | RTE_ETH_RSS_UDP;
	struct rte_eth_conf conf;
	uint16_t own;
	int err;

	memset(&conf, 0, sizeof(conf));
	err = rte_eth_dev_get_mtu(port->id, &own);
	if (err < 0)
		return err;
	conf.rxmode.mtu = mtu != 0 ? mtu : own;
	/* Without it, drivers put all that comes into the first queue. */
	conf.rx_adv_conf.rss_conf.rss_hf = port->queues > 1 ? info->flow_type_rss_offloads & flows : 0;
	if (conf.rx_adv_conf.rss_conf.rss_hf != 0)
		conf.rxmode.mq_mode = RTE_ETH_MQ_RX_RSS;
	err = rte_eth_dev_configure(port->id, port->queues, port->queues, &conf);
	if (err < 0 && mtu != 0) {
		conf.rxmode.mtu = own;
		/* Then it was that. */
		if (rte_eth_dev_configure(port->id, port->queues, port->queues, &conf) == 0)
			return -ERANGE;
	}
	if (err < 0)
		return err;
	/* Drivers without this call have taken it from what they were configured with. */
	err = mtu != 0 ? rte_eth_dev_set_mtu(port->id, mtu) : 0;
	if (err < 0 && err != -ENOTSUP)
		return -ERANGE;
	return rte_eth_dev_get_mtu(port->id, &port->mtu);
}

static int start_queues(struct sl_port *port)
{
	uint16_t rxd = DESCRIPTORS, txd = DESCRIPTORS, queue;
	int socket = rte_eth_dev_socket_id(port->id);
	int err;

	err = rte_eth_dev_adjust_nb_rx_tx_desc(port->id, &rxd, &txd);
	for (queue = 0; err == 0 && queue < port->queues; queue++) {
		err = rte_eth_rx_queue_setup(port->id, queue, rxd, socket, NULL, port->pool);
		if (err == 0)
			err = rte_eth_tx_queue_setup(port->id, queue, txd, socket, NULL);
	}
	if (err == 0)
		err = rte_eth_dev_start(port->id);
	/* Some drivers hear everything anyway, and cannot be told so. */
	if (err == 0)
		rte_eth_promiscuous_enable(port->id);
	return err;
}

static void discard(struct sl_port *port)
{
	struct rte_eth_dev_info info;
	int known = rte_eth_dev_info_get(port->id, &info) == 0;

	rte_eth_dev_stop(port->id);
	rte_eth_dev_close(port->id);
	if (known && info.device != NULL)
		rte_dev_remove(info.device);
	rte_mempool_free(port->pool);
	is_open[port->id] = false;
}

void sl_close(struct sl_port *port)
{
	pthread_mutex_lock(&opening);
	discard(port);
	pthread_mutex_unlock(&opening);
}

static int open_device(const char *device, uint16_t queues, uint16_t mtu, struct sl_port *port)
{
	struct rte_eth_dev_info info;
	char name[RTE_MEMPOOL_NAMESIZE];
	int err;

	memset(port, 0, sizeof(*port));
	err = rte_dev_probe(device);
	if (err < 0)
		return err;
	err = find(device, &port->id);
	if (err < 0)
		return err;
	if (is_open[port->id])
		return -EBUSY;
	is_open[port->id] = true;
	err = rte_eth_dev_info_get(port->id, &info);
	if (err == 0) {
		port->queues = RTE_MIN(queues, RTE_MIN(info.max_rx_queues, info.max_tx_queues));
		err = configure(port, &info, mtu);
	}
	if (err < 0)
		goto failed;
	/* Header, two tags. */
	port->room = RTE_MIN(RTE_MAX(2048, port->mtu + 22), UINT16_MAX - RTE_PKTMBUF_HEADROOM);
	strncpy(port->driver, info.driver_name, sizeof(port->driver) - 1);
	snprintf(name, sizeof(name), "sluice%u", port->id);
	port->pool = rte_pktmbuf_pool_create(name, (2 * DESCRIPTORS + SPARE) * port->queues, 0, 0,
					     port->room + RTE_PKTMBUF_HEADROOM, SOCKET_ID_ANY);
	err = port->pool == NULL ? -rte_errno : start_queues(port);
	if (err == 0)
		return 0;
failed:
	discard(port);
	return err;
}

/* Makes a device and starts it, with at most `queues` queues. */
int sl_open(const char *device, uint16_t queues, uint16_t mtu, struct sl_port *port)
{
	int err;

	pthread_mutex_lock(&opening);
	err = open_device(device, queues, mtu, port);
	pthread_mutex_unlock(&opening);
	return err;
}

/* Whether the link is up; -ENODEV if the device is gone. */
int sl_link(uint16_t id)
{
	struct rte_eth_link link;

	if (rte_eth_dev_is_removed(id))
		return -ENODEV;
	return rte_eth_link_get_nowait(id, &link) == 0 && link.link_status == RTE_ETH_LINK_UP;
}

uint16_t sl_receive(uint16_t id, uint16_t queue, struct rte_mbuf **frames, uint16_t max)
{
	uint16_t count = rte_eth_rx_burst(id, queue, frames, max);
	uint16_t i, kept = 0;

	for (i = 0; i < count; i++) {
		/* Some drivers take tags out unasked. */
		if ((frames[i]->ol_flags & RTE_MBUF_F_RX_VLAN_STRIPPED) && rte_vlan_insert(&frames[i]) != 0)
			rte_pktmbuf_free(frames[i]);
		else
			frames[kept++] = frames[i];
	}
	return kept;
}

/* Where the bytes of a frame are. Returns the number of pieces, 0 if there are too many. */
uint16_t sl_pieces(const struct rte_mbuf *frame, struct sl_piece *pieces)
{
	uint16_t count = 0;

	for (; frame != NULL; frame = frame->next) {
		if (count == PIECES)
			return 0;
		pieces[count].data = rte_pktmbuf_mtod(frame, const void *);
		pieces[count++].len = frame->data_len;
	}
	return count;
}

void sl_free(struct rte_mbuf **frames, uint16_t count)
{
	rte_pktmbuf_free_bulk(frames, count);
}

/* A buffer for a frame of `len` bytes, and where they go; NULL if there is none. */
struct rte_mbuf *sl_alloc(const struct sl_port *port, uint16_t len, void **data)
{
	struct rte_mbuf *frame = len > port->room ? NULL : rte_pktmbuf_alloc(port->pool);

	if (frame != NULL)
		*data = rte_pktmbuf_append(frame, len);
	return frame;
}

/* Sends frames; those behind the number returned are still ours. */
uint16_t sl_send(uint16_t id, uint16_t queue, struct rte_mbuf **frames, uint16_t count)
{
	return rte_eth_tx_burst(id, queue, frames, count);
}
