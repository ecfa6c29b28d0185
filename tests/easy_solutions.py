"""A correct solution of each problem of easy-train and easy-eval. tests/test_easy.py checks the problems with them.

They are not in the shipped files, so that no model finds them there. A solution of an "easy" problem is one return
statement; that of a "medium" problem has more statements.
"""

# ----------------------------------------------------------------------------------------------------------- easy-train


def cube_minus(n):
    return n ** 3 - n


def spread(numbers):
    return max(numbers) - min(numbers)


def word_count(text):
    return len(text.split())


def cost_of(prices, item, count):
    return prices[item] * count


def weeks_to_save(goal, first):
    weeks, saved = 0, 0
    while saved < goal:
        saved += first + weeks
        weeks += 1
    return weeks


def count_peaks(numbers):
    count = 0
    for place in range(1, len(numbers) - 1):
        if numbers[place - 1] < numbers[place] > numbers[place + 1]:
            count += 1
    return count


def is_clock_time(text):
    hour, minute = text.split(":")
    return int(hour) < 24 and int(minute) < 60


def joined_keys(data):
    result = {}
    for outer, inner in data.items():
        for key, value in inner.items():
            result[outer + "." + key] = value
    return result


def excess(x, limit):
    return max(0, x - limit)


def second_then_first(first, second):
    return second + first


def greeting(name):
    return "Hello, " + name + "!"


def turned_round(words):
    return {value: key for key, value in words.items()}


def common_divisors(a, b):
    found = []
    for candidate in range(1, min(a, b) + 1):
        if a % candidate == 0 and b % candidate == 0:
            found.append(candidate)
    return found


def majority(items):
    for item in items:
        if items.count(item) * 2 > len(items):
            return item
    return None


def as_clock(minutes):
    hours = minutes // 60
    rest = minutes % 60
    return f"{hours}:{rest:02d}"


def bar_chart(counts):
    lines = []
    for name in sorted(counts):
        lines.append(name + " " + "*" * counts[name])
    return lines


def halfway(a, b):
    return (a + b) // 2


def every_second(items):
    return items[::2]


def filled_with_stars(text, width):
    return "*" * (width - len(text)) + text


def names_in_order(ages):
    return sorted(ages)


def doublings(start, limit):
    count = 0
    while start < limit:
        start *= 2
        count += 1
    return count


def largest_jump(numbers):
    largest = 0
    for left, right in zip(numbers, numbers[1:]):
        largest = max(largest, abs(left - right))
    return largest


def plural(word):
    if word.endswith("s") or word.endswith("x"):
        return word + "es"
    if word.endswith("y"):
        return word[:-1] + "ies"
    return word + "s"


def still_missing(need, have):
    missing = {}
    for name, count in need.items():
        if count > have.get(name, 0):
            missing[name] = count - have.get(name, 0)
    return missing


def seconds_of(hours, minutes):
    return hours * 3600 + minutes * 60


def mirror_image(items):
    return items == items[::-1]


def shouted(text):
    return text.upper() + "!"


def values_for(prices, items):
    return [prices[item] for item in items]


def sign_word(n):
    if n < 0:
        return "negative"
    if n == 0:
        return "zero"
    return "positive"


def rotated(items, k):
    if not items:
        return []
    k %= len(items)
    return items[len(items) - k:] + items[:len(items) - k]


def masked(word):
    if len(word) <= 2:
        return word
    return word[0] + "*" * (len(word) - 2) + word[-1]


def places_of_words(words):
    places = {}
    for place, word in enumerate(words):
        places.setdefault(word, []).append(place)
    return places


def down_to_ten(n):
    return n // 10 * 10


def last_ones(items, n):
    return items[-n:]


def with_underscores(text):
    return text.replace(" ", "_")


def phone_book(names, numbers):
    return dict(zip(names, numbers))


def halvings(n):
    count = 0
    while n % 2 == 0:
        n //= 2
        count += 1
    return count


def zeros_last(numbers):
    others = [number for number in numbers if number != 0]
    return others + [0] * (len(numbers) - len(others))


def good_password(text):
    has_number = any(character.isdigit() for character in text)
    has_capital = any(character.isupper() for character in text)
    return len(text) >= 8 and has_number and has_capital


def initials_index(words):
    groups = {}
    for word in words:
        groups.setdefault(word[0], []).append(word)
    return groups


def distance(a, b):
    return abs(a - b)


def halves_swapped(items):
    return items[len(items) // 2:] + items[:len(items) // 2]


def repeated_with_dashes(word, n):
    return "-".join([word] * n)


def highest(scores):
    return max(scores.values(), default=0)


def alternating_sum(n):
    total = 0
    for number in range(1, n + 1):
        if number % 2 == 1:
            total += number
        else:
            total -= number
    return total


def flattened(rows):
    items = []
    for row in rows:
        items += row
    return items


def run_lengths(text):
    result, start = "", 0
    for end in range(1, len(text) + 1):
        if end == len(text) or text[end] != text[start]:
            result += text[start] + str(end - start)
            start = end
    return result


def translated(text, words):
    result = []
    for word in text.split():
        result.append(words.get(word, word))
    return " ".join(result)


def is_multiple(n, k):
    return n % k == 0


def place_of_largest(numbers):
    return numbers.index(max(numbers))


def inner_part(text):
    return text[1:-1]


def total_price(prices):
    return sum(prices.values())


def square_numbers_between(a, b):
    count = 0
    for root in range(b + 1):
        if a <= root * root <= b:
            count += 1
    return count


def without_stutter(items):
    kept = []
    for item in items:
        if not kept or item != kept[-1]:
            kept.append(item)
    return kept


def secret_word(word):
    if word[0] in "aeiou":
        return word + "way"
    return word[1:] + word[0] + "ay"


def sums_by_kind(rows):
    sums = {}
    for kind, amount in rows:
        sums[kind] = sums.get(kind, 0) + amount
    return sums


def is_inside(x, low, high):
    return low < x < high


def judged_score(points):
    return sum(points) - max(points) - min(points)


def has_digit(text):
    return any(character.isdigit() for character in text)


def full_name(person):
    return person["first"] + " " + person["last"]


def ticket_price(age):
    if age < 6:
        return 0
    if age < 18:
        return 5
    return 10


def place_of_first_negative(numbers):
    for place, number in enumerate(numbers):
        if number < 0:
            return place
    return -1


def digits_hidden(text):
    result = ""
    for character in text:
        if character.isdigit():
            result += "#"
        else:
            result += character
    return result


def letter_counts(word):
    counts = {}
    for letter in word:
        counts[letter] = counts.get(letter, 0) + 1
    return counts


def middle_of_three(a, b, c):
    return sorted([a, b, c])[1]


def doubled(numbers):
    return [2 * number for number in numbers]


def ends_as_it_begins(word):
    return word[0] == word[-1]


def without_key(data, key):
    return {name: value for name, value in data.items() if name != key}


def divisor_count(n):
    count = 0
    for candidate in range(1, n + 1):
        if n % candidate == 0:
            count += 1
    return count


def evens_and_odds(numbers):
    evens, odds = [], []
    for number in numbers:
        if number % 2 == 0:
            evens.append(number)
        else:
            odds.append(number)
    return [evens, odds]


def ends_swapped(text):
    if len(text) < 2:
        return text
    return text[-1] + text[1:-1] + text[0]


def who_is_inside(log):
    inside = {}
    for name, action in log:
        inside[name] = action == "in"
    return sorted(name for name in inside if inside[name])


def digit_count(n):
    return len(str(n))


def add_in_pairs(a, b):
    return [x + y for x, y in zip(a, b)]


def first_half(text):
    return text[:len(text) // 2]


def with_entry(book, name, number):
    return {**book, name: number}


def parking_fee(minutes):
    if minutes <= 30:
        return 0
    return 2 * ((minutes + 59) // 60)


def row_of_largest_sum(rows):
    best = 0
    for place, row in enumerate(rows):
        if sum(row) > sum(rows[best]):
            best = place
    return best


def vowels_and_others(word):
    vowels = 0
    for letter in word:
        if letter in "aeiou":
            vowels += 1
    return [vowels, len(word) - vowels]


def after_sale(stock, sold):
    left = dict(stock)
    for name in sold:
        left[name] -= 1
    return {name: count for name, count in left.items() if count > 0}


def perimeter(width, height):
    return 2 * (width + height)


def how_many_different(items):
    return len(set(items))


def ends_with_dot(text):
    return text.endswith(".")


def how_many_above(scores, limit):
    return sum(value > limit for value in scores.values())


def triangle_kind(a, b, c):
    if a == b and b == c:
        return "equal"
    if a == b or b == c or a == c:
        return "two"
    return "none"


def in_turn(first, second):
    mixed = []
    for one, other in zip(first, second):
        mixed.append(one)
        mixed.append(other)
    return mixed


def ordinal(n):
    if n == 1:
        return "1st"
    if n == 2:
        return "2nd"
    if n == 3:
        return "3rd"
    return str(n) + "th"


def coins_for(amount):
    coins = {"ten": amount // 10}
    coins["five"] = amount % 10 // 5
    coins["one"] = amount % 5
    return coins


def one_is_even(a, b):
    return (a + b) % 2 == 1


def has_either(items, a, b):
    return a in items or b in items


def same_first_letter(a, b):
    return a[0].lower() == b[0].lower()


def shared_keys(a, b):
    return sorted(key for key in a if key in b)


def sum_of_multiples(k, n):
    total = 0
    for number in range(k, n + 1, k):
        total += number
    return total


def second_largest(numbers):
    rest = [number for number in numbers if number < max(numbers)]
    if not rest:
        return None
    return max(rest)


def first_repeated(text):
    for place, character in enumerate(text):
        if character in text[:place]:
            return character
    return ""


def added_counts(a, b):
    total = dict(a)
    for key, value in b.items():
        total[key] = total.get(key, 0) + value
    return total


def boxes_needed(items, size):
    return (items + size - 1) // size


def first_and_last(items):
    return [items[0], items[-1]]


def initials(first, last):
    return first[0] + "." + last[0] + "."


def twice_as_much(recipe):
    return {name: 2 * amount for name, amount in recipe.items()}


def days_in_month(month):
    if month == 2:
        return 28
    if month in (4, 6, 9, 11):
        return 30
    return 31


def pairs_with_sum(numbers, total):
    count = 0
    for i in range(len(numbers)):
        for j in range(i + 1, len(numbers)):
            if numbers[i] + numbers[j] == total:
                count += 1
    return count


def middle_letters(word):
    half = len(word) // 2
    if len(word) % 2 == 1:
        return word[half]
    return word[half - 1:half + 1]


def word_points(word, points):
    total = 0
    for letter in word:
        total += points.get(letter, 1)
    return total


def square_of_sum(a, b):
    return (a + b) ** 2


def sorted_down(numbers):
    return sorted(numbers, reverse=True)


def listed(words):
    return ", ".join(words)


def updated(old, new):
    return {**old, **new}


def digit_product(n):
    product = 1
    for digit in str(n):
        product *= int(digit)
    return product


def running_total(numbers):
    total, totals = 0, []
    for number in numbers:
        total += number
        totals.append(total)
    return totals


def count_changes(text):
    count = 0
    for place in range(1, len(text)):
        if text[place] != text[place - 1]:
            count += 1
    return count


def follow(data, path):
    for key in path:
        if key not in data:
            return None
        data = data[key]
    return data


def days_of(weeks, days):
    return weeks * 7 + days


def short_words(words):
    return [word for word in words if len(word) <= 3]


def only_first_capital(word):
    return word.capitalize()


def same_keys(a, b):
    return set(a) == set(b)


def add_minutes(hour, minute, extra):
    total = hour * 60 + minute + extra
    return [total // 60 % 24, total % 60]


def keep_first_copies(items):
    kept = []
    for item in items:
        if item not in kept:
            kept.append(item)
    return kept


def camel_case(text):
    words = text.split("_")
    result = words[0]
    for word in words[1:]:
        result += word.capitalize()
    return result


def repeated_words(words):
    counts = {}
    for word in words:
        if words.count(word) > 1:
            counts[word] = words.count(word)
    return counts


# ------------------------------------------------------------------------------------------------------------ easy-eval


def tens_digit(n):
    return n // 10 % 10


def count_positive(numbers):
    return len([number for number in numbers if number > 0])


def last_word(text):
    return text.split()[-1]


def knows_both(phones, a, b):
    return a in phones and b in phones


def smallest_divisor(n):
    divisor = 2
    while n % divisor != 0:
        divisor += 1
    return divisor


def how_many_reach(numbers, goal):
    total = 0
    for count, number in enumerate(numbers, 1):
        total += number
        if total >= goal:
            return count
    return -1


def common_start(a, b):
    count = 0
    while count < len(a) and count < len(b) and a[count] == b[count]:
        count += 1
    return a[:count]


def winner(scores):
    best = ""
    for name in sorted(scores):
        if best == "" or scores[name] > scores[best]:
            best = name
    return best


def handshakes(people):
    return people * (people - 1) // 2


def is_longer(first, second):
    return len(first) > len(second)


def without_digits(text):
    return "".join(character for character in text if not character.isdigit())


def points_of(scores, name):
    return scores.get(name, 0)


def largest_power_of_two(n):
    power = 1
    while power * 2 <= n:
        power *= 2
    return power


def longest_run(items):
    longest, run = 0, 0
    for place, item in enumerate(items):
        if place > 0 and item == items[place - 1]:
            run += 1
        else:
            run = 1
        longest = max(longest, run)
    return longest


def framed(text):
    line = "*" * (len(text) + 2)
    return line + "\n*" + text + "*\n" + line


def rank_of(scores, name):
    rank = 1
    for value in scores.values():
        if value > scores[name]:
            rank += 1
    return rank


def same_sign(a, b):
    return a * b > 0


def sum_below_zero(numbers):
    return sum(number for number in numbers if number < 0)


def count_letter(text, letter):
    return text.count(letter)


def in_stock(stock):
    return sorted(name for name, count in stock.items() if count > 0)


def even_digit_sum(n):
    total = 0
    for digit in str(n):
        if int(digit) % 2 == 0:
            total += int(digit)
    return total


def sum_within(numbers, limit):
    total = 0
    for number in numbers:
        if total + number <= limit:
            total += number
    return total


def up_and_down(text):
    result = ""
    for place, character in enumerate(text):
        if place % 2 == 0:
            result += character.upper()
        else:
            result += character.lower()
    return result


def team_of_each(teams):
    result = {}
    for team, members in teams.items():
        for member in members:
            result[member] = team
    return result


def last_digit(n):
    return n % 10


def all_even(numbers):
    return all(number % 2 == 0 for number in numbers)


def words_backwards(text):
    return " ".join(text.split()[::-1])


def word_lengths(words):
    return {word: len(word) for word in words}


def grade(points):
    if points >= 90:
        return "A"
    if points >= 70:
        return "B"
    return "C"


def in_chunks(items, size):
    chunks = []
    for start in range(0, len(items), size):
        chunks.append(items[start:start + size])
    return chunks


def longer_one(a, b):
    if len(a) > len(b):
        return "first"
    if len(a) < len(b):
        return "second"
    return "same"


def cart_total(cart, prices):
    total = 0
    for name, count in cart.items():
        total += count * prices.get(name, 0)
    return total


def change_due(price, count, paid):
    return paid - price * count


def without_first(items):
    return items[1:]


def letters_in_order(word):
    return "".join(sorted(word))


def cheapest(prices):
    return min(prices, key=prices.get)


def digits_rise(n):
    digits = str(n)
    for left, right in zip(digits, digits[1:]):
        if left >= right:
            return False
    return True


def until_negative(numbers):
    kept = []
    for number in numbers:
        if number < 0:
            break
        kept.append(number)
    return kept


def next_letter(letter):
    if letter == "z":
        return "a"
    return chr(ord(letter) + 1)


def names_of_unique_values(ages):
    names = []
    for name in sorted(ages):
        if list(ages.values()).count(ages[name]) == 1:
            names.append(name)
    return names
