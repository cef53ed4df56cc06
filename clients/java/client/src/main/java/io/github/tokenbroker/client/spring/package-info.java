/**
 * Puts tokens on the requests of Spring's {@code RestClient}, {@code RestTemplate} and {@code
 * WebClient}.
 */
package io.github.tokenbroker.client.spring;
