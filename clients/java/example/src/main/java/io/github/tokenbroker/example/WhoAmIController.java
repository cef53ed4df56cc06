package io.github.tokenbroker.example;

import io.github.tokenbroker.client.TokenClient;
import org.springframework.web.bind.annotation.GetMapping;
import org.springframework.web.bind.annotation.RestController;
import org.springframework.web.client.RestClient;

/** Asks the API who the account is. */
@RestController
class WhoAmIController {
  private final RestClient acme;
  private final TokenClient tokens;

  WhoAmIController(RestClient acme, TokenClient tokens) {
    this.acme = acme;
    this.tokens = tokens;
  }

  @GetMapping("/whoami")
  String whoAmI() {
    String url = tokens.token("acme").apiBaseUrl() + "/whoami";
    return acme.get().uri(url).retrieve().body(String.class);
  }
}
