/** The client of Token Broker. Begin with {@link io.github.tokenbroker.client.TokenClient}. */
package io.github.tokenbroker.client;
