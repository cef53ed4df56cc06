package io.github.tokenbroker.example;

import io.github.tokenbroker.client.TokenClient;
import io.github.tokenbroker.client.spring.TokenRequestInterceptor;
import java.net.http.HttpClient;
import org.springframework.boot.SpringApplication;
import org.springframework.boot.autoconfigure.SpringBootApplication;
import org.springframework.context.annotation.Bean;
import org.springframework.http.client.JdkClientHttpRequestFactory;
import org.springframework.web.client.RestClient;

/** A program whose requests to the API carry the token of the account {@code acme}. */
@SpringBootApplication
public class ExampleApplication {
  /**
   * Starts the program. It reads {@code TOKEN_BROKER_ENDPOINT} and the other variables of {@link
   * TokenClient#fromEnvironment}.
   *
   * @param arguments those of Spring
   */
  public static void main(String[] arguments) {
    SpringApplication.run(ExampleApplication.class, arguments);
  }

  /** The client of the whole program. Spring closes it. */
  @Bean
  TokenClient tokenClient() {
    return TokenClient.fromEnvironment();
  }

  /** Sends the token to the API, and nowhere else. */
  @Bean
  RestClient acme(RestClient.Builder builder, TokenClient tokens) {
    HttpClient http = HttpClient.newBuilder().followRedirects(HttpClient.Redirect.NEVER).build();
    return builder
        .requestFactory(new JdkClientHttpRequestFactory(http))
        .requestInterceptor(new TokenRequestInterceptor(tokens, "acme"))
        .build();
  }
}
