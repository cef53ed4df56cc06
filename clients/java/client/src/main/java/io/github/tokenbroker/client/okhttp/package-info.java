/** Puts tokens on the requests of OkHttp. */
package io.github.tokenbroker.client.okhttp;
